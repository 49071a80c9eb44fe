"""A base with random weights small enough for every test, as a folder and as a model."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from torch import Tensor

    from posecrafter_rt.avatar import Avatar
    from posecrafter_rt.models.loading import PoseModel

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: no test may reach for a network
# Of this run alone, processes that tests start included: graphs exported once serve every test that builds an engine.
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # then the process that started this one has set the cache
if IS_WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one worker a core: more threads would only wait for one another
    if hasattr(os, "sched_setaffinity"):  # nor do builds start processes to help them, with the one core that they see
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})
else:
    os.environ["POSECRAFTER_CACHE"] = tempfile.mkdtemp(prefix="posecrafter-tests-")


# The files that take longest, in the order in which they are begun, so that at the end no core waits for another. The
# second exports the tiny base's networks for 32 × 32 pixels, which those after it then find in the cache.
LONGEST_FILES = (
    "cli/test_demo.py",
    "test_refit.py",
    "export/test_onnx.py",
    "cli/test_render.py",
    "kernels/test_compile.py",
    "test_rendering.py",
    "runtime/test_stream.py",
    "engines/test_parity.py",
    "test_adjusting.py",
    "serve/test_command.py",
    "engines/test_inductor.py",
    "native/test_fuzz.py",
    "bench/test_latency.py",
    "bench/test_throughput.py",
    "serve/test_soak.py",
    "bench/test_scaling.py",
    "native/test_build.py",
    "test_tuning.py",
    "test_avatar.py",
    "test_building.py",
    "embedded/test_train.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Files are handed to the workers in the order of `pytest_collection_modifyitems`, not by their number of tests."""
    absent = [name for name in LONGEST_FILES if not (Path(__file__).parent / name).is_file()]
    if absent:
        raise pytest.UsageError(f"LONGEST_FILES in {__file__} names what is not there: {', '.join(absent)}")
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False
    # No example is timed: a machine may stand still in any.
    settings.register_profile("untimed", settings.default, deadline=None)
    settings.load_profile("untimed")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if IS_WORKER:
        folder = Path(__file__).parent
        ranks = {folder / name: rank for rank, name in enumerate(LONGEST_FILES)}
        items.sort(key=lambda item: ranks.get(item.path, len(ranks)))  # stable: within a file nothing moves


def pytest_collection_finish() -> None:
    forget_garbage()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if nextitem is not None and nextitem.path != item.path:
        forget_garbage()


def forget_garbage() -> None:
    """Let no later collection look at what is there now; every avatar that closes makes one. What is imported stays."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    if not IS_WORKER:
        shutil.rmtree(os.environ["POSECRAFTER_CACHE"], ignore_errors=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend_name`: every backend; those that need a GPU or minutes are marked, and skipped where they cannot run."""
    if "backend_name" not in metafunc.fixturenames:
        return
    from posecrafter_rt.engines import get_backend, names

    own_marks = {"tensorrt": [pytest.mark.gpu, pytest.mark.tensorrt], "inductor": [pytest.mark.slow]}
    marked = []
    for name in names():
        reason = get_backend(name).unsupported_reason("fp32")
        skip = pytest.mark.skipif(reason is not None, reason=str(reason))
        marked.append(pytest.param(name, marks=[*own_marks.get(name, []), skip]))
    metafunc.parametrize("backend_name", marked, scope="module")


TINY_DENOISER: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,  # diffusers' historical name: the number of heads
    "cross_attention_dim": 32,
    "norm_num_groups": 16,
}
TINY_UNET: dict[str, Any] = {
    **TINY_DENOISER,
    "sample_size": 16,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TINY_CONTROLNET: dict[str, Any] = {**TINY_DENOISER, "conditioning_embedding_out_channels": (16, 32)}
TINY_VAE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 32,
}
TINY_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "projection_dim": 32,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Of torch, whatever the machine has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def write_tiny_base() -> Callable[..., Path]:
    """Writes a diffusers folder of a tiny Stable Diffusion: write_tiny_base(folder, seed=0, settings=None) -> folder.

    The VAE's factor is 2, so a size of 32 × 32 pixels has latents of 16 × 16. Text: 77 tokens of 32 channels.
    """
    import torch
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from posecrafter_rt.embedded.text import write_tokenizer

    def write(folder: Path, seed: int = 0, settings: dict[str, Any] | None = None) -> Path:
        tokenizer = write_tokenizer(folder / "tokenizer")
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            controlnet = ControlNetModel(**TINY_CONTROLNET)
            for conv in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
                torch.nn.init.normal_(conv.weight, std=0.1)  # zero would hide the ControlNet from every comparison
            torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.1)
            models = {
                "unet": UNet2DConditionModel(**TINY_UNET),
                "controlnet": controlnet,
                "vae": AutoencoderKL(**TINY_VAE),
                "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TINY_TEXT, **ids)),
            }
        for name, model in models.items():
            model.save_pretrained(folder / name)
        (folder / "scheduler").mkdir(parents=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
        settings = {"size": [32, 32], "learning_rate": 0.001, "steps": 3, "minibatch": 2, **(settings or {})}
        (folder / "posecrafter.json").write_text(json.dumps(settings))
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, write_tiny_base: Callable[..., Path]) -> Path:
    """The folder of a tiny base with random weights (see `write_tiny_base`); do not write to it."""
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tuned for three steps on four frames of noise; do not write to it."""
    import numpy as np

    from posecrafter_rt.tuning import TuneOptions, tune
    from tests.tiny import SIZE, some_poses

    path = tmp_path_factory.mktemp("tuned") / "tuned.ckpt"
    frames = np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3), np.uint8)
    tune(frames, some_poses(4), path, TuneOptions(base=str(tiny_base), frames=4, steps=3, precision="fp32"))
    return path


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its engine of the torch backend; nothing but its caches may be written to."""
    from posecrafter_rt.building import build_engine
    from tests.tiny import TORCH

    return build_engine(tiny_checkpoint, tmp_path_factory.mktemp("engines") / "tiny.engine", TORCH).folder.path


@pytest.fixture
def avatar(tiny_engine: Path) -> Iterator[Avatar]:
    """That engine, loaded for one test."""
    from posecrafter_rt.avatar import Avatar

    with Avatar.load(tiny_engine) as avatar:
        yield avatar


# Layers of the tiny base, one of each kind that a LoRA may add to; the text encoder's without the level `text_model`.
LORA_LAYERS = {
    "unet": [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "down_blocks.0.attentions.0.proj_in",  # 1×1
        "down_blocks.0.resnets.0.conv1",  # 3×3
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.0.resnets.0.time_emb_proj",
    ],
    "text_encoder": ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"],
}


@pytest.fixture(scope="session")
def tiny_factors(tiny_base: Path) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """A LoRA of rank 2 for the tiny base: (down, up) by (network, layer) of LORA_LAYERS."""
    import torch

    from posecrafter_rt.models.loading import load_base

    generator = torch.Generator().manual_seed(4)
    modules, factors = load_base(str(tiny_base)).modules(), {}
    for role, layers in LORA_LAYERS.items():
        weights = {name.removeprefix("text_model."): tensor for name, tensor in modules[role].named_parameters()}
        for layer in layers:
            rows, *columns = weights[f"{layer}.weight"].shape
            down = torch.randn(2, *columns, generator=generator) * 0.3
            factors[role, layer] = down, torch.randn(rows, 2, *(1 for _ in columns[1:]), generator=generator) * 0.3
    return factors


@pytest.fixture(scope="session")
def tiny_lora(
    tiny_factors: dict[tuple[str, str], tuple[Tensor, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same as a file under peft's names; do not write to it."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("loras") / "style.safetensors"
    pairs = {f"{role}.{layer}": pair for (role, layer), pair in tiny_factors.items()}
    save_file({f"{name}.lora_{side}.weight": factor for name, pair in pairs.items()
               for side, factor in zip("AB", pair, strict=True)}, path)  # fmt: skip
    return path


@pytest.fixture(scope="session")
def make_tiny_model(tiny_base: Path) -> Callable[..., PoseModel]:
    """Loads the tiny base: make_tiny_model(norm_scope="frame"), with conv_temp random, so that frames do interact."""
    import torch

    from posecrafter_rt.models.loading import load_base

    loaded: dict[str, PoseModel] = {}

    def make(norm_scope: str = "frame") -> PoseModel:
        if norm_scope not in loaded:
            loaded[norm_scope] = load_base(str(tiny_base), norm_scope=norm_scope)  # type: ignore[arg-type]
        kept = loaded[norm_scope]
        model = copy.deepcopy(kept, {id(kept.tokenizer): kept.tokenizer})  # a third of the time of loading
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.unet.named_parameters():
            if ".conv_temp." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.unet.gives_deep_features = True  # as in engines, whose graphs are then the same
        return model

    return make


@pytest.fixture
def tiny_model(make_tiny_model: Callable[..., PoseModel]) -> PoseModel:
    """A tiny `PoseModel` with random weights in every part, fresh for each test."""
    return make_tiny_model()
