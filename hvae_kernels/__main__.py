"""``python -m hvae_kernels``: what runs where, and why not otherwise."""

from hvae_kernels import show_config

if __name__ == "__main__":
    show_config()
