"""Registration and backend choice: one set of schemas, the order of precedence, life without a compiled library."""

import inspect
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import tokenprune_kernels as tp
from testing.process import printed, python
from tokenprune_kernels import _registry
from tokenprune_kernels._op import OPS, PYTHON_ONLY, public_ops

over_ops = pytest.mark.parametrize("op", public_ops())
needs_library = pytest.mark.skipif(tp.config()["backends"]["cpu"] is not None, reason="no compiled library here")
SCORES = torch.tensor([[0.1, 0.9, 0.5]])


# --- schemas --------------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("op", OPS)
def test_compiled_schemas_equal_those_of_python(op: str) -> None:
    """With the library loaded, the registered schema is the one of csrc/generated/ops.h."""
    in_python = torch._C.parse_schema(f"tokenprune::{op}{OPS[op].schema}")
    assert str(getattr(torch.ops.tokenprune, op).default._schema) == str(in_python)


def test_the_described_ops_are_registered_and_exported_and_no_others() -> None:
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("tokenprune::")}
    assert registered == {f"tokenprune::{op}" for op in OPS}
    assert set(public_ops()) == set(tp.ops.__all__) == set(tp.reference.__all__)
    assert set(public_ops()) < set(tp.__all__)


def test_the_cpp_half_of_the_descriptions_is_fresh() -> None:
    printed("-m", "scripts.generate_ops", "--check")


@over_ops
def test_python_functions_and_references_have_the_arguments_of_the_schema(op: str) -> None:
    schema = getattr(torch.ops.tokenprune, op).default._schema
    expected = [(a.name, a.kwarg_only, a.default_value if a.has_default_value() else None) for a in schema.arguments]

    def described(function) -> list[tuple]:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in PYTHON_ONLY]
        empty = inspect.Parameter.empty
        return [(p.name, p.kind is p.KEYWORD_ONLY, None if p.default is empty else p.default) for p in parameters]

    assert described(getattr(tp.reference, op)) == expected
    assert described(getattr(tp, op)) == expected
    more = [p for p in inspect.signature(getattr(tp, op)).parameters.values() if p.name in PYTHON_ONLY]
    assert more[-1].name == "backend"
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in more)


@over_ops
def test_ops_neither_alias_nor_mutate(op: str) -> None:
    schema = getattr(torch.ops.tokenprune, op).default._schema
    assert not schema.is_mutable
    assert all(a.alias_info is None for a in [*schema.arguments, *schema.returns])


# --- backend choice -------------------------------------------------------------------------------------------------
# "cuda" cannot serve CPU tensors on any machine: asking for it shows in the error who decided.


def test_argument_wins_over_use_backend() -> None:
    with tp.use_backend("cuda"):
        assert tp.select_topk(SCORES, 2, backend="reference")[0].tolist() == [[1, 2]]
        assert tp.select_topk(SCORES, 2, backend="auto")[0].tolist() == [[1, 2]]
    with tp.use_backend("reference"), pytest.raises(tp.BackendUnavailableError, match="'cuda' was asked for"):
        tp.select_topk(SCORES, 2, backend="cuda")


@over_ops
def test_every_function_honours_use_backend(op: str) -> None:
    from testing import op_samples as samples

    call = samples.make(op)
    args, kwargs = samples.positional(call)
    with tp.use_backend("cuda"), pytest.raises(tp.BackendUnavailableError, match=r"'cuda' was asked for, but .{10}"):
        getattr(tp, op)(*args, **kwargs)
    with pytest.raises(ValueError, match="backend must be one of auto, cuda, triton, cpu, reference, got 'tpu'"):
        getattr(tp, op)(*args, **kwargs, backend="tpu")


@pytest.mark.parametrize(
    ("architectures", "served", "not_served"),
    [
        ("8.0;9.0a;10.0+PTX", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], [(7, 5), (9, 1)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("9.0a+PTX", [(9, 0)], [(8, 0), (10, 0)]),
        ("7.5+PTX", [(7, 5), (8, 0), (12, 0)], [(7, 0)]),
    ],
)
def test_which_gpus_a_build_runs_on(architectures: str, served: list, not_served: list) -> None:
    assert all(_registry.fits(architectures, *capability) for capability in served)
    assert not any(_registry.fits(architectures, *capability) for capability in not_served)


def test_a_gpu_the_build_does_not_fit_is_served_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors of a GPU: what `auto` chooses follows from the device's compute capability."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tokenprune_kernels import _backend, _triton

    monkeypatch.setattr(_registry, "build_info", lambda: {"cuda_architectures": "8.0;9.0a"})
    monkeypatch.setattr(_triton, "unavailable", lambda device: None)
    with FakeTensorMode():
        scores = torch.empty(1, 3, device="cuda")
    _triton.namespace()
    for capability, chosen in (((8, 6), torch.ops.tokenprune), ((12, 0), torch.ops.tokenprune_triton)):
        _registry._fits_device.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        assert _backend.implementation(None, scores, "select_topk") is chosen
    _registry._fits_device.cache_clear()


@pytest.fixture
def gpu_scores(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.Tensor]:
    """A fake tensor on a GPU that the build fits; what is cached about GPUs is forgotten afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tokenprune_kernels import _triton

    def forget() -> None:
        _registry._fits_device.cache_clear()
        _registry.old_driver.cache_clear()

    info = {"cuda_architectures": "9.0a", "cuda_runtime": 13000}
    monkeypatch.setattr(_registry, "build_info", lambda: info)
    monkeypatch.setattr(_triton, "unavailable", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    _triton.namespace()
    forget()
    with FakeTensorMode():
        scores = torch.empty(1, 3, device="cuda")
    yield scores
    forget()


@pytest.mark.parametrize("driver", [0, 13000, 13010, 14000])
def test_a_new_enough_driver_runs_the_compiled_kernels(
    driver: int, gpu_scores: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an answer of the driver, CUDA itself would say what is wrong."""
    from tokenprune_kernels import _backend

    monkeypatch.setattr(_registry, "driver_version", lambda: driver)
    assert _registry.old_driver() is None
    assert _backend.implementation(None, gpu_scores, "select_topk") is torch.ops.tokenprune


def test_an_older_driver_leaves_the_gpu_to_triton_and_says_so_once(
    gpu_scores: torch.Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenprune_kernels import _backend

    monkeypatch.setattr(_registry, "driver_version", lambda: 12080)
    reason = "the GPU's driver runs CUDA 12.8 and older, and the compiled kernels were built with CUDA 13.0"
    with pytest.warns(RuntimeWarning, match="cannot use its CUDA kernels: " + re.escape(reason)) as warned:
        chosen = [_backend.implementation(None, gpu_scores, "select_topk") for _ in range(3)]
    assert chosen == [torch.ops.tokenprune_triton] * 3
    assert len(warned) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(_registry, "_binary", object())
    assert _backend.unavailable("cuda", "cuda") == reason
    tp.show_config()
    assert f"  cuda: unavailable, {reason}" in capsys.readouterr().out


def test_a_backend_asked_for_by_name_looks_at_the_gpu_of_the_inputs(
    gpu_scores: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current GPU, number 1, is none that the build fits; the inputs are on number 0."""
    from tokenprune_kernels import _backend

    monkeypatch.setattr(_registry, "driver_version", lambda: 13000)
    monkeypatch.setattr(_registry, "_binary", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (8, 6))[index])
    assert gpu_scores.device.index == 0
    assert _backend.implementation("cuda", gpu_scores, "select_topk") is torch.ops.tokenprune
    assert _backend.served_by("select_topk", gpu_scores) == "cuda"
    assert _backend.unavailable("cuda", "cuda:1") == _backend.unavailable("cuda", "cuda") is not None


def test_the_driver_is_asked_for_its_version() -> None:
    """An integer wherever it runs: 0 without a driver."""
    version = _registry.driver_version()
    assert version == 0 or version >= 11000
    assert (version > 0) or not torch.cuda.is_available()


def test_a_second_call_asks_cuda_for_nothing(gpu_scores: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `auto` has to know of a GPU it has asked once."""
    from tokenprune_kernels import _backend

    asked: list[str] = []
    for name in ("get_device_capability", "get_device_properties", "is_available", "current_device", "device_count"):
        monkeypatch.setattr(
            torch.cuda, name, lambda *args, name=name: asked.append(name) or ((9, 0) if "capability" in name else 0)
        )
    monkeypatch.setattr(_registry, "driver_version", lambda: asked.append("driver") or 13000)
    _backend.implementation(None, gpu_scores, "select_topk")
    assert sorted(asked) == ["driver", "get_device_capability"]
    asked.clear()
    for op in public_ops():
        _backend.implementation(None, gpu_scores, op)
    assert asked == []


@needs_library
def test_the_reference_serves_an_op_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenprune_kernels._backend import served_by

    assert served_by("select_topk", SCORES) == "cpu"
    with tp.use_backend("reference"):
        assert served_by("select_topk", SCORES) == "reference"
    monkeypatch.setitem(OPS, "select_topk", replace(OPS["select_topk"], backends=("cuda",)))
    assert served_by("select_topk", SCORES) == "reference"
    assert served_by("score_entropy", SCORES) == "cpu"


def test_use_backend_nests_and_is_restored_after_errors() -> None:
    with tp.use_backend("cuda"):
        with tp.use_backend("reference"):
            tp.select_topk(SCORES, 2)
        with pytest.raises(ZeroDivisionError), tp.use_backend("reference"):
            raise ZeroDivisionError
        with pytest.raises(tp.BackendUnavailableError):
            tp.select_topk(SCORES, 2)
    tp.select_topk(SCORES, 2)
    with pytest.raises(ValueError, match="backend must be one of"), tp.use_backend("gpu"):
        pass
    tp.select_topk(SCORES, 2)


def test_use_backend_holds_for_its_own_thread() -> None:
    seen: dict[str, object] = {}
    both_inside = threading.Barrier(2, timeout=30)

    def work(name: str) -> None:
        with tp.use_backend(name):
            both_inside.wait()
            try:
                seen[name] = tp.select_topk(SCORES, 2)[0].tolist()
            except tp.BackendUnavailableError as error:
                seen[name] = str(error)
            both_inside.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "cuda")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen["reference"] == [[1, 2]]
    assert "'cuda' was asked for" in str(seen["cuda"])
    outside: list[list] = []
    with tp.use_backend("cuda"):
        thread = threading.Thread(target=lambda: outside.append(tp.select_topk(SCORES, 2)[0].tolist()))
        thread.start()
        thread.join()
    assert outside == [[[1, 2]]]


def test_environment_variable_is_the_default_and_everything_else_wins_over_it() -> None:
    script = """
import torch, tokenprune_kernels as tp
scores = torch.tensor([[0.1, 0.9, 0.5]])
def ask(**kwargs):
    try:
        return tp.select_topk(scores, 2, **kwargs)[0].tolist()
    except tp.BackendUnavailableError as error:
        return str(error)
print(ask())
print(ask(backend="reference"))
with tp.use_backend("reference"):
    print(ask())
with tp.use_backend("auto"):
    print(ask())
"""
    lines = printed("-c", script, TOKENPRUNE_BACKEND="cuda").splitlines()
    assert "'cuda' was asked for" in lines[0]
    assert lines[1:] == ["[[1, 2]]"] * 3
    assert printed("-c", script, TOKENPRUNE_BACKEND="").splitlines() == ["[[1, 2]]"] * 4


def test_environment_variable_with_an_unknown_name_is_refused() -> None:
    done = python("-c", "import tokenprune_kernels", TOKENPRUNE_BACKEND="gpu")
    assert done.returncode != 0
    assert "TOKENPRUNE_BACKEND must be one of auto, cuda, triton, cpu, reference, got 'gpu'" in done.stderr


# --- config ---------------------------------------------------------------------------------------------------------


def test_config_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    config = tp.config()
    assert config["tokenprune_kernels"] == tp.__version__
    assert config["torch"] == torch.__version__
    assert set(config["backends"]) == {"cpu", "cuda", "triton", "reference"}
    assert config["backends"]["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in config["backends"].values())
    tp.show_config()
    shown = capsys.readouterr().out
    for name, reason in config["backends"].items():
        assert f"  {name}: {'available' if reason is None else f'unavailable, {reason}'}\n" in shown
    assert f"torch: {torch.__version__}\n" in shown
    for op, served in config["ops"].items():
        on_the_cpu = tp._backend.served_by(op, torch.zeros(1))
        assert served.split(", ")[0] == f"{on_the_cpu} on cpu"
        assert f"  {op}: {served}\n" in shown
    assert set(config["ops"]) == set(public_ops())


@needs_library
def test_config_describes_the_build() -> None:
    build = tp.config()["compiled library"]
    assert build["torch_floor"] == "2.10"
    assert build["cpu_capability"] in build["cpu_capabilities"].split(",")
    assert build["compiler"]
    assert _registry.load_error() is None


def test_importing_the_package_imports_no_heavy_module() -> None:
    script = """
import sys, torch
before = set(sys.modules)
import tokenprune_kernels
heavy = {"torch._dynamo", "torch._inductor", "triton", "transformers", "PIL", "skimage", "rich", "sympy", "numpy"}
heavy |= {"torch.distributed.tensor"}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    assert printed("-c", script).strip() == "[]"


# --- without the compiled library -----------------------------------------------------------------------------------


def test_without_the_library_the_ops_exist_and_config_says_why() -> None:
    script = """
import sys, warnings
sys.modules["tokenprune_kernels._C"] = None
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import tokenprune_kernels as tp
assert [w.category for w in caught if "references" in str(w.message)] == [RuntimeWarning], caught
config = tp.config()
assert "not loaded: no compiled library was built" in config["compiled library"], config
assert "not loaded" in config["backends"]["cpu"], config
assert torch.ops.tokenprune.select_topk(torch.tensor([[0.1, 0.9, 0.5]]), 2)[0].tolist() == [[1, 2]]
assert tp.select_topk(torch.tensor([[0.1, 0.9, 0.5]]), 2)[0].tolist() == [[1, 2]]
try:
    tp.select_topk(torch.zeros(1, 3), 2, backend="cpu")
except tp.BackendUnavailableError as error:
    print(error)
"""
    assert "the compiled library is not loaded (" in printed("-c", script)


@pytest.mark.skipif(os.environ.get("TOKENPRUNE_TEST_WITHOUT_LIBRARY") == "1", reason="this is that very run")
def test_without_the_library_the_contract_holds() -> None:
    chosen = "may_be_zero or beyond_the_tokens or no_gradient or test_errors or opcheck"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    files = [f"tests/{name}.py" for name in (
        "ops/test_contract", "ops/test_contract_memory", "ops/test_errors", "package/test_dispatch"
    )]  # fmt: skip
    told = printed(*command, *files, TOKENPRUNE_TEST_WITHOUT_LIBRARY="1", TOKENPRUNE_TEST_BACKENDS="reference")
    assert " passed" in told
    assert "failed" not in told
