"""What is no tensor, or no tensor of the right kind, is refused by a sentence that names the argument."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch

import hvae_kernels as hk
from hvae_kernels import functional as F
from hvae_kernels.ops.annealed_leapfrog import annealed_leapfrog_update
from hvae_kernels.ops.leapfrog_update import leapfrog_update
from hvae_kernels.ops.rmsprop import rmsprop_step_

FLOW = hk.nn.InverseAutoregressiveFlow(3, [4], 2)
SPLINE = F.Spline(4)


def energy(z):
    return z.square().sum(-1)


def ones(*shape):
    return torch.ones(shape)


_ROWS, _ROW, _STEPS = {"z": ones(4, 3), "rho": ones(4, 3)}, ones(3), ones(2)
_GAUSSIAN = {**_ROWS, "precision": _ROW, "loc": _ROW, "step_size": _ROW, "tempering": _STEPS}
_PLANAR = {"z": ones(4, 3), "u": ones(2, 3), "w": ones(2, 3), "b": _STEPS, "constrain": True}
_MIXTURE = {"value": ones(4, 3), "mixture_logits": _STEPS, "loc": ones(2, 3), "log_scale": ones(2, 3)}
_MADE = {"features": 3, "hidden_features": [4], "context_features": 0, "order": [2, 1, 0], "activation": "relu"}
_MADE |= {"hidden_degrees": [[0, 0, 1, 1]]}
_FLOW = {**_MADE, "gate": "sigmoid"}
_INTEGERS = [0, 1, 2]

#: Of every public function, module and method: what it is called with.
CALLS = {
    "affine_autoregressive": (
        F.affine_autoregressive,
        {"z": ones(4, 3), "shift": ones(4, 3), "log_scale": ones(4, 3), "gate": "affine"},
    ),
    "annealed_leapfrog_update": (
        annealed_leapfrog_update,
        {
            **{**_ROWS, "base_grad": ones(4, 3), "grad": ones(4, 3), "noise": ones(4, 3)},
            **{"kicks": ones(5, 3), "mixing": ones(2)},
        },
    ),
    "bernoulli_log_prob": (F.bernoulli_log_prob, {"logits": ones(4, 3), "value": ones(4, 3), "event_ndims": 1}),
    "constrain_planar": (F.constrain_planar, {"u": ones(2, 3), "w": ones(2, 3)}),
    "dense_gaussian_leapfrog": (F.dense_gaussian_leapfrog, {**_GAUSSIAN, "precision": ones(3, 3)}),
    "draw_read": (F.draw_read, {"images": ones(2, 1, 4, 3), "attention": ones(2, 5), "size": 2}),
    "draw_write": (F.draw_write, {"patch": ones(2, 1, 2, 2), "attention": ones(2, 5), "image_size": (4, 3)}),
    "dreg_surrogate": (F.dreg_surrogate, {"log_weights": ones(4, 3), "dim": 0}),
    "gaussian_leapfrog": (F.gaussian_leapfrog, _GAUSSIAN),
    "gaussian_leapfrog_with_vjp": (F.gaussian_leapfrog_with_vjp, _GAUSSIAN),
    "gaussian_mixture_log_prob": (F.gaussian_mixture_log_prob, _MIXTURE),
    "gaussian_mixture_responsibilities": (F.gaussian_mixture_responsibilities, _MIXTURE),
    "iwae_bound": (F.iwae_bound, {"log_weights": ones(4, 3), "dim": 0}),
    "leapfrog": (
        F.leapfrog,
        {
            **{**_ROWS, "potential": energy, "step_size": _ROW, "tempering": _STEPS},
            **{"params": [], "memory": "store", "gradient": "full", "compile": False, "on_drift": None},
        },
    ),
    "leapfrog_update": (
        leapfrog_update,
        {**_ROWS, "grad": ones(4, 3), "decay": ones(), "kick": _ROW, "drift": _ROW},
    ),
    "local_reparam_linear": (
        F.local_reparam_linear,
        {
            **{"x": ones(4, 3), "weight_loc": ones(2, 3), "weight_log_scale": ones(2, 3)},
            **{"bias_loc": ones(2), "bias_log_scale": ones(2), "noise": ones(4, 2)},
        },
    ),
    "masked_linear": (
        F.masked_linear,
        {
            **{"x": ones(4, 3), "weight": ones(2, 3), "bias": ones(2)},
            **{"in_degrees": torch.arange(3), "out_degrees": torch.arange(2), "strict": False},
        },
    ),
    "planar_flow": (F.planar_flow, _PLANAR),
    "planar_flow_with_vjp": (F.planar_flow_with_vjp, _PLANAR),
    "radial_flow": (F.radial_flow, {"z": ones(4, 3), "center": ones(2, 3), "alpha": _STEPS, "beta": _STEPS}),
    "rational_quadratic_spline": (
        F.rational_quadratic_spline,
        {"x": ones(4, 3), "parameters": ones(4, 3, 11), "spline": SPLINE, "inverse": False, "event_ndims": 1},
    ),
    "rmsprop_step_": (
        rmsprop_step_,
        {
            **{"parameter": ones(4, 3), "gradient": ones(4, 3), "square_average": ones(4, 3)},
            **{"learning_rate": 0.1, "alpha": 0.9, "eps": 1e-8, "max_norm": 1.0},
        },
    ),
    "stl_surrogate": (F.stl_surrogate, {"log_weights": ones(4, 3), "dim": 0}),
    "Gate": (F.Gate, {"name": "clipped", "parameters": (-1.0, 1.0)}),
    "Spline": (
        F.Spline,
        {
            **{"bins": 4, "bound": [-3.0, 3.0, -3.0, 3.0], "tails": "linear", "style": "nflows"},
            **{"min_width": 1e-3, "min_height": 1e-3, "min_derivative": 1e-3, "logit_scale": 1.0},
        },
    ),
    "CouplingFlow": (
        hk.nn.CouplingFlow,
        {
            **{"features": 3, "hidden_features": [4], "context_features": 2, "gate": "affine"},
            **{"mask": [True, False, True], "activation": "relu", "conditioner": torch.nn.Identity()},
        },
    ),
    "CouplingFlow.forward": (
        hk.nn.CouplingFlow(3, [4], 2).forward,
        {"z": ones(4, 3), "context": ones(4, 2)},
    ),
    "CouplingFlow.inverse": (
        hk.nn.CouplingFlow(3, [4], 2).inverse,
        {"z": ones(4, 3), "context": ones(4, 2)},
    ),
    "FlowStack.coupling": (hk.nn.FlowStack.coupling, {"n_layers": 2, "features": 3, "hidden_features": [4]}),
    "accelerate": (hk.accelerate, {"module": torch.nn.Linear(2, 2)}),
    "path_log_prob": (
        hk.path_log_prob,
        {
            "flow": FLOW,
            "z": ones(4, 3),
            "context": ones(4, 2),
            "base": torch.distributions.MultivariateNormal(_ROW, torch.eye(3)),
        },
    ),
    "use_impl": (lambda implementation: hk.use_impl(implementation).__enter__(), {"implementation": "auto"}),
    "use_cpu": (lambda instruction_set: hk.use_cpu(instruction_set).__enter__(), {"instruction_set": "auto"}),
    "FlowStack": (hk.nn.FlowStack, {"flows": [FLOW]}),
    "FlowStack.autoregressive": (
        hk.nn.FlowStack.autoregressive,
        {
            **{"kind": hk.nn.InverseAutoregressiveFlow, "n_layers": 2, "features": 3, "hidden_features": [4]},
            **{"orders": "permuted", "generator": None},
        },
    ),
    "FlowStack.forward": (hk.nn.FlowStack([FLOW]).forward, {"z": ones(4, 3), "context": ones(4, 2)}),
    "FlowStack.inverse": (hk.nn.FlowStack([FLOW]).inverse, {"z": ones(4, 3), "context": ones(4, 2)}),
    "FlowTransform": (hk.nn.FlowTransform, {"flow": FLOW, "context": ones(4, 2), "cache_size": 0}),
    "GaussianPotential": (hk.nn.GaussianPotential, {"precision": _ROW, "loc": _ROW}),
    "GaussianPotential.forward": (hk.nn.GaussianPotential(_ROW, _ROW), {"z": ones(4, 3)}),
    "AnnealedHamiltonianFlow": (
        hk.nn.AnnealedHamiltonianFlow,
        {
            **{"features": 3, "n_bridges": 2, "leapfrog_steps": 1, "refreshment": 0.5, "max_step_size": 0.5},
            **{"init_step_size": 0.1, "memory": "store", "betas": _STEPS, "learn_refreshment": True},
            **{"bridge_step_sizes": True, "score_features": 4, "gradient": "full", "compile": False},
        },
    ),
    "AnnealedHamiltonianFlow.forward": (
        hk.nn.AnnealedHamiltonianFlow(3, 2),
        {"z": ones(4, 3), "noise": ones(3, 4, 3), "potential": energy, "base_potential": energy, "params": []},
    ),
    "AnnealedImportanceSampling": (
        hk.nn.AnnealedImportanceSampling,
        {"features": 3, "n_bridges": 2, "leapfrog_steps": 1, "init_step_size": 0.1},
    ),
    **{
        f"AnnealedImportanceSampling.{name}": (
            getattr(hk.nn.AnnealedImportanceSampling(3, 2, 1), name),
            {"z": ones(4, 3), "potential": energy, "base_potential": energy, "generator": None},
        )
        for name in ("forward", "reverse", "tune")
    },
    "HamiltonianFlow": (
        hk.nn.HamiltonianFlow,
        {
            **{"features": 3, "n_steps": 2, "tempering": "free", "max_step_size": 0.5, "init_step_size": 0.1},
            **{"init_temperature": 2.0, "replicas": 2, "memory": "store", "gradient": "full", "compile": False},
        },
    ),
    "HamiltonianFlow.forward": (
        hk.nn.HamiltonianFlow(3, 2),
        {"z": ones(4, 3), "gamma": ones(4, 3), "potential": energy, "params": []},
    ),
    "InverseAutoregressiveFlow": (hk.nn.InverseAutoregressiveFlow, _FLOW),
    "InverseAutoregressiveFlow.forward": (FLOW.forward, {"z": ones(4, 3), "context": ones(4, 2)}),
    "InverseAutoregressiveFlow.inverse": (FLOW.inverse, {"z": ones(4, 3), "context": ones(4, 2)}),
    "LocalReparamLinear": (
        hk.nn.LocalReparamLinear,
        {"in_features": 3, "out_features": 2, "bias": True, "prior_scale": 1.0},
    ),
    "LocalReparamLinear.forward": (hk.nn.LocalReparamLinear(3, 2), {"x": ones(4, 3), "generator": None}),
    "MADE": (hk.nn.MADE, {**_MADE, "outputs_per_feature": 2}),
    "MADE.forward": (hk.nn.MADE(3, [4], 2, 2), {"x": ones(4, 3), "context": ones(4, 2)}),
    "MaskedAutoregressiveFlow": (hk.nn.MaskedAutoregressiveFlow, _FLOW),
    "MaskedLinear": (
        hk.nn.MaskedLinear,
        {"in_degrees": _INTEGERS, "out_degrees": _INTEGERS, "bias": True, "strict": False},
    ),
    "MaskedLinear.forward": (hk.nn.MaskedLinear(_INTEGERS, _INTEGERS), {"x": ones(4, 3)}),
    "PlanarFlow": (hk.nn.PlanarFlow, {"features": 3, "n_layers": 2, "shared": False}),
    "PlanarFlow.forward": (hk.nn.PlanarFlow(3, 2), {"z": ones(4, 3), "context": None}),
    "RadialFlow": (hk.nn.RadialFlow, {"features": 3, "n_layers": 2}),
    "RadialFlow.forward": (hk.nn.RadialFlow(3, 2), {"z": ones(4, 3), "context": None}),
}
for _name, (_function, _arguments) in CALLS.items():
    if "implementation" in inspect.signature(_function).parameters and _name != "use_impl":
        CALLS[_name] = _function, {**_arguments, "implementation": "reference"}
EACH = [pytest.param(name, argument, id=f"{name}-{argument}") for name in CALLS for argument in CALLS[name][1]]
STRANGERS = {
    "float": 1.5,
    "none": None,
    "list": [1.0, 2.0, 3.0],
    "string": "three",
    "array": np.ones((4, 3), np.float32),
    "object": object(),
}
#: Where these are not strangers: a float is a number, None is the default, a list holds degrees.
WELCOME = {
    "float": {"learning_rate", "alpha", "eps", "max_norm", "prior_scale", "init_temperature"}
    | {"max_step_size", "refreshment", "bound", "min_derivative", "logit_scale"},
    "none": {"generator", "bias", "bias_loc", "bias_log_scale", "params", "on_drift", "replicas", "memory", "order"}
    | {"hidden_degrees", "context", "implementation", "tails", "mask", "conditioner", "base"}
    | {"betas", "score_features"},
}


def names(argument, error):
    """Whether the error says of this argument, under its own name, what it must be."""
    named = {"name": "gate", "instruction_set": "instruction set"}
    named = named.get(argument, argument)
    return re.search(rf"\b({named})\b.* must be ", str(error)) is not None


def test_every_public_name_is_called():
    public = {*F.__all__, *hk.nn.__all__, "accelerate", "path_log_prob", "use_impl", "use_cpu"}
    assert public <= set(CALLS)


def test_every_function_with_kernels_takes_an_implementation():
    functions = {name for name in F.__all__ if inspect.isfunction(getattr(F, name))}
    takes = {name for name in functions if "implementation" in CALLS[name][1]}
    assert functions - takes == {"constrain_planar"}
    for name in takes:
        parameter = inspect.signature(getattr(F, name)).parameters["implementation"]
        assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, None), name


#: Options that may be given by place, as users write them, beside contexts, which are data.
BY_PLACE = {
    "AnnealedImportanceSampling": {"leapfrog_steps", "init_step_size"},
    "AnnealedHamiltonianFlow": {"leapfrog_steps", "refreshment", "max_step_size", "init_step_size", "memory"},
    "Gate": {"parameters"},
    "HamiltonianFlow": {"tempering", "max_step_size", "init_step_size", "init_temperature"},
    "InverseAutoregressiveFlow": {"context_features", "gate", "order"},
    "MADE": {"outputs_per_feature", "context_features", "order", "activation"},
    "MaskedAutoregressiveFlow": {"context_features", "gate", "order"},
    "PlanarFlow": {"shared"},
    "Spline": {"bound", "tails", "style", "min_width", "min_height", "min_derivative"},
    "CouplingFlow": {"context_features", "gate", "mask", "activation"},
    "bernoulli_log_prob": {"event_ndims"},
    "dreg_surrogate": {"dim"},
    "iwae_bound": {"dim"},
    "stl_surrogate": {"dim"},
}


@pytest.mark.parametrize("name", [name for name in CALLS if name.split(".")[0] in {*F.__all__, *hk.nn.__all__}])
def test_options_are_given_by_name(name):
    parameters = inspect.signature(CALLS[name][0]).parameters.values()
    by_place = {x.name for x in parameters if x.default is not x.empty and x.kind is not x.KEYWORD_ONLY}
    assert by_place - {"context"} == BY_PLACE.get(name, set())


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_fine_as_they_are(name):
    function, arguments = CALLS[name]
    function(**arguments)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("name", "argument"), EACH)
def test_strangers_are_refused(name, argument, autocast):
    function, arguments = CALLS[name]
    for kind, stranger in STRANGERS.items():
        if argument in WELCOME.get(kind, ()) and not (name.startswith(("radial", "planar")) and argument == "alpha"):
            continue
        if kind == "float" and (name, argument) == ("AnnealedImportanceSampling", "init_step_size"):
            continue
        with torch.autocast("cpu", torch.bfloat16, autocast), pytest.raises((TypeError, ValueError)) as caught:
            function(**{**arguments, argument: stranger})
        assert names(argument, caught.value), f"{kind}: {caught.value!r}"
        if not isinstance(stranger, type(arguments[argument])) and arguments[argument] is not None:
            assert caught.type is TypeError, f"{kind}: {caught.value!r}"


#: A FlowTransform's are checked where they are used.
EACH_TENSOR = [
    case
    for case in EACH
    if isinstance(CALLS[case.values[0]][1][case.values[1]], torch.Tensor) and "Transform" not in case.id
]

TENSORS = {
    "no_dimension": lambda x: x.new_ones(()),
    "complex": lambda x: x.to(torch.complex64),
    "integer": lambda x: x.to(torch.int64),
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize(("name", "argument"), EACH_TENSOR)
def test_tensors_of_other_kinds_are_refused(name, argument, implementation):
    """By a sentence of ours, unless they are of use."""
    function, arguments = CALLS[name]
    for kind, made in TENSORS.items():
        stranger = made(arguments[argument])
        if (
            (kind == "no_dimension" and argument in ("step_size", "decay"))
            or (kind == "integer" and argument.endswith("degrees"))
            or (kind == "meta" and argument == "log_weights")  # the only tensor
        ):
            continue
        with hk.use_impl(implementation), pytest.raises((TypeError, ValueError)) as caught:
            function(**{**arguments, argument: stranger})
        assert re.search(r"\w+: \w+ must (be|have) ", str(caught.value)), f"{kind}: {caught.value!r}"
