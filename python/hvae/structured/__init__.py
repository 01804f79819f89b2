"""Latent variables whose dependencies are learned: ``models`` the auto-encoder, ``figures`` its graph.

Trained and compared by ``hvae mnist --model structured structured-iaf``.
"""
