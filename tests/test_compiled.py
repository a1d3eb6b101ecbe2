"""The compiled backends against plain PyTorch: Triton, by its interpreter where there is no GPU, and C."""

import os
import shutil
from dataclasses import dataclass
from itertools import product, zip_longest

import pytest
import torch
from conftest import need_c, without_compiled
from forks import visible_in
from plain_loop import relative
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lora_kit.kernels import dispatch, segments
from lora_kit.kernels.backend import GatedInputs
from lora_kit.kernels.cpu.backend import Cpu
from lora_kit.kernels.plain import ACTIVATIONS
from lora_kit.kernels.segments import Segments
from lora_kit.recipe.load import load_recipe
from lora_kit.training import loop

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # which sigmoid is made for
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # the interpreter cuts, others round
OF_C = 6e-3  # two roundings to bf16 are 2e-3, and shares of attention are rounded too


def triton():
    """The module of the backend for GPUs; an error in it must not pass for a missing Triton."""
    pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
    from lora_kit.kernels.triton import backend

    return backend


@dataclass(frozen=True)
class By:
    """A backend, and the precision in which it computes."""

    language: str
    dtype: torch.dtype

    def __str__(self):
        return f"{self.language}-{self.dtype}".replace("torch.", "")

    @property
    def device(self):
        return torch.device("cuda" if GPU and self.language == "triton" else "cpu")

    @property
    def backend(self):
        if self.language == "triton":
            return triton().Triton()
        need_c()
        return Cpu()

    def drawn(self, *shape, seed=0):
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device, self.dtype)

    def near(self, ours, theirs):
        bound = OF_C if self.language == "c" else TOLERANCE[self.dtype]
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert relative(one.float(), other.float()) < bound


def marks_of(by):
    """The marks of a test by a backend."""
    return [pytest.mark.gpu] if GPU and by.language == "triton" else []


def ways(dtypes, *others):
    """Run a test by Triton in these precisions, and by the other backends given."""
    by_each = [*(By("triton", one) for one in dtypes), *others]
    return pytest.mark.parametrize("by", [pytest.param(by, marks=marks_of(by)) for by in by_each], ids=str)


@pytest.fixture
def fresh():
    """Try the kernels again, in this test and after it."""
    dispatch._triton.cache_clear()
    yield
    dispatch._triton.cache_clear()


by_c = By("c", torch.bfloat16)
everywhere = ways(TOLERANCE, by_c)
IN_DOTS = [torch.float32, torch.bfloat16 if GPU else torch.float16]  # which the interpreter does not know in bf16


@everywhere
@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("shape", [(37, 64), (5, 100), (1, 5000)])
def test_a_norm_and_its_gradient(by, gemma, shape):
    x, weight, above = by.drawn(*shape), by.drawn(shape[1], seed=1), by.drawn(*shape, seed=2)
    plain = x.float().requires_grad_()
    expected = torch.nn.functional.rms_norm(plain, shape[1:], eps=1e-5) * (weight.float() + gemma)
    (of_x,) = torch.autograd.grad(expected, plain, above.float())
    output, inverse = by.backend.rms_norm(x, weight, 1e-5, gemma=gemma)
    ours = by.backend.rms_norm_backward(above, x, weight, inverse, gemma=gemma)
    by.near([output, ours], [expected.to(by.dtype), of_x.to(by.dtype)])


@ways(IN_DOTS)
@pytest.mark.parametrize("ranks", [(16, 16), (8, 40)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gated_activation_with_adapters_and_its_gradients(by, ranks, name):
    shapes = [(50, 200), (50, 200), (50, sum(ranks)), (200, ranks[0]), (200, ranks[1]), (50, 200)]
    gate, up, low, *ups, above = (by.drawn(*shape, seed=seed) for seed, shape in enumerate(shapes))
    lows = low.float().split(ranks, dim=1)
    plain = [one.float() + part @ b.float().T for one, part, b in zip((gate, up), lows, ups, strict=True)]
    plain = [one.requires_grad_() for one in plain]
    expected = ACTIVATIONS[name][0](plain[0]) * plain[1]
    gradients = torch.autograd.grad(expected, plain, above.float())
    inputs = GatedInputs(gate, up, low, tuple(ups), name)
    by.near([by.backend.gated(inputs)], [expected.to(by.dtype)])
    by.near(by.backend.gated_backward(above.clone(), inputs), [one.to(by.dtype) for one in gradients])


@everywhere
@pytest.mark.parametrize("width", [24, 64])
def test_rotary_positions(by, width):
    x, cos, sin = by.drawn(5, 37, width), by.drawn(37, width, seed=1), by.drawn(37, width, seed=2)
    angles = (cos[None].float(), sin[None].float())
    expected = apply_rotary_pos_emb(x[None].float(), x[None].float(), *angles)[0][0]
    rotated = by.backend.rotate(x, cos, sin)
    by.near([rotated], [expected.to(by.dtype)])
    with_gaps = torch.cat([x, x], dim=2)[..., width:]
    assert not with_gaps.is_contiguous() and torch.equal(by.backend.rotate(with_gaps, cos, sin), rotated)


MASKS = list(product([None, 20], [(), ((1, 2), (70, 75), (0, 20))]))  # windows and forks
# the mask does not depend on the precision, so the slow interpreter applies them all in one precision only
BY_MASK = [(by, *mask) for by in (By("triton", IN_DOTS[0]), by_c) for mask in MASKS]
BY_MASK += [(By("triton", dtype), *MASKS[-1]) for dtype in IN_DOTS[1:]]


@pytest.mark.parametrize(("width", "heads", "shared"), [(24, 4, 2), (64, 2, 2), (136, 2, 1)])
@pytest.mark.parametrize(
    ("by", "window", "forks"),
    [
        pytest.param(by, window, forks, marks=marks_of(by), id=f"{by}-{window}-{'forked' if forks else 'whole'}")
        for by, window, forks in BY_MASK
    ],
)
def test_attention_inside_examples_and_its_gradients(by, width, heads, shared, window, forks):
    lengths = (3, 130, 40)
    shapes = [(sum(lengths), many, width) for many in (heads, shared, shared, heads)]
    *given, above = (by.drawn(*shape, seed=seed) for seed, shape in enumerate(shapes))
    plain, outputs = [one.float().requires_grad_() for one in given], []
    for *parts, fork in zip_longest(*(one.split(lengths) for one in plain), forks):
        by_head = [part.transpose(0, 1).repeat_interleave(heads // part.shape[1], dim=0) for part in parts]
        seen = visible_in(len(parts[0]), window, fork).to(by.device)
        outputs.append(functional.scaled_dot_product_attention(*by_head, seen, scale=0.3).transpose(0, 1))
    expected = torch.cat(outputs)
    gradients = torch.autograd.grad(expected, plain, above.float())
    rest, inputs = (Segments(lengths, by.device, forks), 0.3, window), [one.transpose(0, 1) for one in given]
    output, saved = by.backend.attention(*inputs, *rest)
    ours = [one.transpose(0, 1) for one in by.backend.attention_backward(above, saved, *rest)]
    by.near([output, *ours], [one.to(by.dtype) for one in (expected, *gradients)])


@ways([torch.bfloat16])
def test_the_number_of_rows_does_not_change_the_bits_of_a_row(by):
    x, weight = by.drawn(64, 128), by.drawn(128, seed=1)
    whole, _ = by.backend.rms_norm(x, weight, 1e-5, gemma=False)
    for rows in (1, 16, 33):
        assert torch.equal(by.backend.rms_norm(x[:rows], weight, 1e-5, gemma=False)[0], whole[:rows])


@pytest.mark.parametrize("dropout", [0, 0.1])
@ways([torch.float32])
def test_a_step_with_them_is_the_step_without(by, dropout, recipe_file, tmp_path, captured, jobs, monkeypatch):
    backend = by.backend
    monkeypatch.setattr(torch.cuda, "is_available", lambda: by.device.type == "cuda")
    monkeypatch.setattr(segments, "TILED_DTYPES", (by.dtype,))
    changes = ["train.steps=1", "train.batch_size=2", f"adapter.dropout={dropout}", "adapter.rank=3"]
    recipe = load_recipe(recipe_file, [*changes, f"base.dtype={by.dtype}".replace("torch.", "")])
    without_compiled(monkeypatch)
    loop.train(recipe, tmp_path / "plain")
    monkeypatch.setattr(dispatch, "backend_of", lambda _: backend)
    loop.train(recipe, tmp_path / "ours")
    (_, plain), (_, ours) = captured
    assert jobs[1].facts.resolved.kernels == ("lora", "mlp", "norm", "rotary", "loss", "last mlp")
    bound = 1e-5 if by.dtype == torch.float32 else 5e-2  # how near the truth: test_precision
    assert 0 < relative(ours, plain) < bound  # 0 would be the same code twice


def test_where_triton_compiles_nothing_there_is_a_warning_and_plain_pytorch(monkeypatch, fresh):
    def refused(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, **_: torch.zeros(shape, dtype=dtype))
    assert isinstance(dispatch._triton(), triton().Triton)
    monkeypatch.setattr(triton().Triton, "gated_backward", refused)
    dispatch._triton.cache_clear()
    with pytest.warns(UserWarning, match="Triton cannot compile its kernels, .*: Failed to find C compiler"):
        assert dispatch._triton() is dispatch.PLAIN


def test_triton_keeps_its_kernels_elsewhere_where_home_cannot_be_written(tmp_path, monkeypatch):
    home, cache, temporary = (tmp_path / name for name in ("home", "cache", "temporary"))
    temporary.mkdir()
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LORA_KIT_CACHE", str(cache))
    monkeypatch.setattr(dispatch.tempfile, "gettempdir", lambda: str(temporary))

    def moved():
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        dispatch._move_triton_cache()
        return os.environ.get("TRITON_CACHE_DIR")

    assert moved() is None and (home / ".triton" / "cache").is_dir()
    shutil.rmtree(home)
    home.write_text("a file: nothing can be written below it, also not by root")
    assert moved() == str(cache / "triton")
    (cache / "triton").chmod(0o777)
    assert moved() == str(temporary / f"lora_kit-triton-{os.getuid()}"), "others could exchange the kernels"
    (temporary / f"lora_kit-triton-{os.getuid()}").chmod(0o777)
    assert moved() is None, "then it falls back to PyTorch, with a warning"
