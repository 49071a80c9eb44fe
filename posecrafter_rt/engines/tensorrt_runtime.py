"""Running TensorRT plans: torch's memory, a workspace that networks share, a CUDA graph for each shape, refitting.

Layer 4: needs TensorRT and a GPU; which tensors are copied is decided by pure functions.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from posecrafter_rt.engines.base import InputChecker, fitting_weights
from posecrafter_rt.engines.cuda_graphs import recording
from posecrafter_rt.engines.manifest import rebuild_networks_hint
from posecrafter_rt.engines.refit import HINT_BF16, in_stored_type
from posecrafter_rt.engines.tensorrt_common import failure, leave_memory, make_logger, start, torch_dtype, trt_dtype
from posecrafter_rt.errors import CheckpointError, PoseCrafterError, ShapeError, first_line
from posecrafter_rt.export.shapes import resolve_shape, split_dim
from posecrafter_rt.spec import NetworkSpec

if TYPE_CHECKING:
    import tensorrt as trt

ALIGNMENT = 256  # bytes, of every address that TensorRT is given
# An input up to this size is copied into its own buffer, as a step's latents are (8 MiB for 128 frames of 512 × 512
# pixels); a larger one is read in place.
COPIED_BYTES = 16 << 20
KEPT_SHAPES = 4  # each with its context and output buffers
KEPT_GRAPHS = 8  # per shape, one for each set of addresses
# Networks of two workspaces may be called in two threads, but only one call is launched at a time, which takes little
# time. Whatever another thread does to the whole device breaks a recording: making a context, or recording, which waits
# for the device. The network's device is current meanwhile: TensorRT puts plans there, and each thread has its own.
_launching = Lock()

log = logging.getLogger(__name__)

Shapes = tuple[tuple[int, ...], ...]
Addresses = tuple[int, ...]
Types = Mapping[str, torch.dtype]  # of a plan's inputs and outputs


def is_copied(tensor: Tensor) -> bool:
    """Whether an input is copied into a buffer of its own before a run.

    A graph is bound to addresses. Small tensors, such as latents or one row of a table, have a new address at every
    step; large ones (ControlNet residuals, pose embeddings) keep theirs. What is not aligned is copied, too.
    """
    return tensor.numel() * tensor.element_size() <= COPIED_BYTES or tensor.data_ptr() % ALIGNMENT != 0


def output_shapes(spec: NetworkSpec, shapes: Shapes) -> Shapes:
    """Return the outputs' shapes for inputs of these shapes."""
    sizes: dict[str, int] = {}
    for tensor, shape in zip(spec.inputs, shapes, strict=True):
        for dim, length in zip(tensor.dims, shape, strict=True):
            if isinstance(dim, str):
                symbol, divisor = split_dim(dim)
                sizes[symbol] = length * divisor
    return tuple(resolve_shape(tensor.dims, sizes) for tensor in spec.outputs)


class Workspace:
    """A stream, and the activation memory that networks on it use in turn; it grows with the shapes that are run.

    generation: how often it has grown; addresses of another generation are no longer valid.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.generation = 0

    def reserve(self, num_bytes: int) -> None:
        """Have at least so much memory; if there was less, it is new memory."""
        if num_bytes > self.memory.numel():
            self.stream.synchronize()  # what runs may still need the old one
            self.generation += 1
            self.memory = torch.empty(0, dtype=torch.uint8, device=self.device)  # free the old one first
            leave_memory()
            self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)


class Slot:
    """One network at one set of input shapes: a context, output buffers, buffers of small inputs, CUDA graphs.

    A context never sees a second shape: AOT plugins of TensorRT 11.1 and 11.2 leave a CUDA module behind at each
    change (TensorRT issue 4849).
    """

    def __init__(
        self, spec: NetworkSpec, engine: trt.ICudaEngine, types: Types, workspace: Workspace, shapes: Shapes,
        networks_folder: Path,
    ) -> None:  # fmt: skip
        import tensorrt as trt

        self.spec, self.workspace = spec, workspace
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context: trt.IExecutionContext = engine.create_execution_context(strategy)
        if context is None:
            raise failure(f"TensorRT cannot prepare {spec.name} for {spec.inputs[0].name} of {shapes[0]}")
        self.context: trt.IExecutionContext = context
        for tensor, shape in zip(spec.inputs, shapes, strict=True):
            if not context.set_input_shape(tensor.name, shape):
                raise ShapeError(f"{spec.name}: {tensor.name} of {shape} is outside what the engine was built for",
                                 f"change --max-frames or --size and {rebuild_networks_hint(networks_folder)}")  # fmt: skip
        # It returns 0 if it cannot tell; the plan knows what its largest shapes take.
        self.num_bytes = context.update_device_memory_size_for_shapes() or engine.device_memory_size_v2
        self.generation = -1
        self.buffers: dict[str, Tensor] = {}
        self.outputs = {
            tensor.name: torch.empty(shape, dtype=types[tensor.name], device=workspace.device)
            for tensor, shape in zip(spec.outputs, output_shapes(spec, shapes), strict=True)
        }
        for name, output in self.outputs.items():
            self._set_address(name, output)
        self.graphs: OrderedDict[Addresses, torch.cuda.CUDAGraph | None] = OrderedDict()
        self.records = True

    def run(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Run on the workspace's stream, which must wait for the inputs; the outputs are this slot's own buffers.

        The first run at new addresses is launched kernel by kernel, the second is recorded, later ones are replayed.
        """
        self._take_workspace()
        bound = [self._bound(tensor.name, given) for tensor, given in zip(self.spec.inputs, inputs, strict=True)]
        addresses = tuple(tensor.data_ptr() for tensor in bound)
        graph = self.graphs.get(addresses)
        if graph is not None:
            self.graphs.move_to_end(addresses)
            graph.replay()
            return self.outputs
        for tensor, memory in zip(self.spec.inputs, bound, strict=True):
            self._set_address(tensor.name, memory)
        if addresses in self.graphs and self.records:
            graph = self._record()
        self.graphs[addresses] = graph
        if len(self.graphs) > KEPT_GRAPHS:
            self.workspace.stream.synchronize()
            self.graphs.popitem(last=False)
        if graph is not None:
            graph.replay()
        else:
            self._enqueue()
        return self.outputs

    def _take_workspace(self) -> None:
        """Make the workspace large enough, and bind the context to it if its memory is new since the last run."""
        if self.num_bytes == 0:  # nothing to bind: a workspace that is still empty has no address
            return
        self.workspace.reserve(self.num_bytes)
        if self.generation != self.workspace.generation:
            self.graphs.clear()  # they were recorded with the old addresses
            self.context.set_device_memory(self.workspace.memory.data_ptr(), self.workspace.memory.numel())
            self.generation = self.workspace.generation

    def _set_address(self, name: str, tensor: Tensor) -> None:
        if not self.context.set_tensor_address(name, tensor.data_ptr()):
            raise failure(f"TensorRT refuses the memory of {self.spec.name}'s {name}, {tuple(tensor.shape)}")

    def _bound(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor that the kernels will read: the input itself, or its buffer after a copy."""
        if not is_copied(tensor):
            return tensor
        if name not in self.buffers:
            self.buffers[name] = torch.empty_like(tensor, device=self.workspace.device)
        return self.buffers[name].copy_(tensor, non_blocking=True)

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.workspace.stream.cuda_stream):
            raise failure(f"TensorRT could not run {self.spec.name}")

    def _record(self) -> torch.cuda.CUDAGraph | None:
        """Record the launches of one run; if TensorRT cannot be recorded, return None, and never try again."""
        self.workspace.stream.synchronize()  # TensorRT requires that the run before has ended
        graph = torch.cuda.CUDAGraph()
        try:
            with recording(graph, stream=self.workspace.stream):
                self._enqueue()
        except (RuntimeError, PoseCrafterError) as error:
            log.warning("%s runs without a CUDA graph: %s", self.spec.name, first_line(error))
            self.records = False
            return None
        return graph


class TensorRTEngine:
    """One network.

    plan: reads the plan onto the GPU. It is called once, when the network first runs or its weights are replaced: a
    process that renders has no use for a stream's networks.
    """

    has_own_threads = False

    def __init__(
        self, spec: NetworkSpec, plan: Callable[[], trt.ICudaEngine], workspace: Workspace, weights: Path
    ) -> None:
        self.spec, self.device = spec, workspace.device
        self._checked = InputChecker(spec, self.device)
        self._read_plan, self._workspace, self._weights = plan, workspace, weights
        self._slots: OrderedDict[Shapes, Slot] = OrderedDict()
        self._swapped: dict[str, Tensor] = {}

    @property
    def activations(self) -> Tensor:
        """The memory that networks share for what lives within a run; it stays, and grows."""
        return self._workspace.memory

    @cached_property
    def _engine(self) -> trt.ICudaEngine:
        leave_memory()
        return self._read_plan()

    @cached_property
    def _types(self) -> Types:
        engine: trt.ICudaEngine = self._engine
        return {tensor.name: torch_dtype(engine.get_tensor_dtype(tensor.name))
                for tensor in (*self.spec.inputs, *self.spec.outputs)}  # fmt: skip

    @torch.inference_mode()
    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """See `Engine`; outputs are reused by the next call of the same shape.

        Two threads may call networks of different workspaces, each on a current stream of its own.
        """
        given = self._checked(inputs)
        stream, current = self._workspace.stream, torch.cuda.current_stream(self._workspace.device)
        with _launching, torch.cuda.device(self.device):
            # Only "kept" tensors can be of another type: zeros in place of what no call has returned yet.
            tensors = [tensor.to(self._types[expected.name]).contiguous()
                       for expected, tensor in zip(self.spec.inputs, given, strict=True)]  # fmt: skip
            stream.wait_stream(current)  # for the inputs, and for readers of a slot's outputs that may now go
            slot = self._slot(tuple(tuple(tensor.shape) for tensor in tensors))
            with torch.cuda.stream(stream):
                outputs = slot.run(tensors)
            current.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(stream)  # so that its memory is not reused before it was read
        return dict(outputs)

    def _slot(self, shapes: Shapes) -> Slot:
        if shapes not in self._slots:
            if len(self._slots) >= KEPT_SHAPES:
                self._workspace.stream.synchronize()
                self._slots.popitem(last=False)
            self._slots[shapes] = Slot(
                self.spec, self._engine, self._types, self._workspace, shapes, self._weights.parent
            )
        self._slots.move_to_end(shapes)
        return self._slots[shapes]

    def swap_weights(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """See `Engine.swap_weights`; graphs are recorded anew."""
        with safe_open(self._weights, "pt") as stored:
            names = stored.keys()
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in names}
            fitting = fitting_weights(shapes, tensors)
            if fitting:
                swapped = self._swapped | {name: tensor.detach().cpu() for name, tensor in fitting.items()}
                hint = rebuild_networks_hint(self._weights.parent)
                # Refitting synchronizes the device, which breaks a recording.
                with _launching, torch.cuda.device(self.device):
                    self._workspace.stream.synchronize()
                    refit(self._engine, swapped, names, stored.get_tensor, hint)
                    self._slots.clear()
                self._swapped = swapped  # only now that TensorRT has taken them
        return set(fitting)


def refit(
    engine: trt.ICudaEngine, changed: Mapping[str, Tensor], names: Iterable[str], stored: Callable[[str], Tensor],
    hint: str,
) -> None:  # fmt: skip
    """Replace weights by name. Those that TensorRT merged with changed ones must be in `names`; `stored` gives them.

    Raises: CheckpointError if a changed one is beyond the range of the type that it is stored in, and, with this hint,
        if TensorRT refuses; OutOfMemory if memory is the reason.
    """
    import tensorrt as trt

    refitter: trt.Refitter = start(lambda: trt.Refitter(engine, make_logger()))
    kept: list[Tensor] = []  # TensorRT reads them when it refits, not when they are set

    def give(name: str, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        kept.append(tensor)
        weights = trt.Weights(trt_dtype(tensor.dtype), tensor.data_ptr(), tensor.numel())
        if not refitter.set_named_weights(name, weights):
            raise failure(f"TensorRT refuses {name}", hint, CheckpointError)

    refittable = set(refitter.get_all_weights())
    missing = set(changed) - refittable
    if missing:
        raise CheckpointError(f"the engine cannot replace {min(missing)}", hint)
    for name, tensor in changed.items():
        give(name, in_stored_type(name, tensor, stored(name).dtype, CheckpointError, HINT_BF16))
    for name in refitter.get_missing_weights():
        if name not in names:
            raise CheckpointError(f"the engine merged {name or 'a constant'} with a weight", hint)
        give(name, stored(name))
    if not refitter.refit_cuda_engine():
        raise failure("TensorRT could not replace the weights", hint, CheckpointError)
