"""TensorRT plans behind the Engine protocol: a CUDA graph per batch size, several streams, nothing allocated on the way."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import HardwareError, ImgclsError
from ..core.labels import LabelSpace
from ..core.pixels import Pixels
from .base import blank, closed, least_scores, score_in_parts
from .trt_plan import CudaDevice, Messages, check_plan, foreign, listening, machine, require_trt, start_runtime

if TYPE_CHECKING:
    import tensorrt as trt

INPUT, OUTPUT = "pixels", "scores"
_SIZES = 8  # batch sizes for which a stream keeps a context and a graph; the one not used for longest goes first


@dataclass(frozen=True)
class Shapes:
    """What a plan takes: `lowest` to `highest` images, each `image` = (H, W, C), and K `columns`."""

    lowest: int
    highest: int
    image: tuple[int, ...]
    columns: int


def shapes_of(engine: trt.ICudaEngine) -> Shapes:
    """Read from the engine, and compared with what all our graphs have.

    Raises:
        ValueError: other inputs or outputs, or other types.
    """
    import tensorrt as trt

    found = {
        name: (engine.get_tensor_mode(name), engine.get_tensor_dtype(name))
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors))
    }
    wanted = {
        INPUT: (trt.TensorIOMode.INPUT, trt.DataType.UINT8),
        OUTPUT: (trt.TensorIOMode.OUTPUT, trt.DataType.FLOAT),
    }
    if found != wanted:
        raise ValueError(
            f"its tensors are {', '.join(map(str, found)) or 'none'}, not uint8 {INPUT} and float32 {OUTPUT}"
        )
    ends = [dims_of(shape) for shape in engine.get_tensor_profile_shape(INPUT, 0)]
    scores = dims_of(engine.get_tensor_shape(OUTPUT))
    if len(ends) != 3 or len(ends[0]) != 4 or len(scores) != 2:
        raise ValueError(f"its shapes are {ends} and {scores}")
    return Shapes(ends[0][0], ends[2][0], ends[2][1:], scores[1])


def dims_of(shape: trt.Dims) -> tuple[int, ...]:
    """TensorRT's Dims as a tuple; they have a length and an index, but no iterator."""
    return tuple(shape[i] for i in range(len(shape)))


@dataclass(frozen=True)
class _Loaded:
    """A deserialised plan, and what its lanes share."""

    engine: trt.ICudaEngine
    runtime: trt.Runtime  # must outlive the engine
    device: CudaDevice
    shapes: Shapes
    refused: Callable[[str], ImgclsError]
    making: threading.Lock  # held while contexts and graphs are made
    facts: dict[str, Any]


class TrtEngine:
    """A TensorRT plan as an Engine. See `base.Engine`.

    Any number of threads may ask: `streams` of them at a time, each on a stream with buffers and contexts of its own.

    Args:
        plan: the file.
        meta: its meta.json.
        device: which GPU.
        streams: batches in flight.
        bundle: digest of the bundle that is meant; empty: not compared.
        thresholds: least score per column, see `base.Engine`.

    Raises:
        HardwareError: H004 without TensorRT, H001 without a GPU, H002 when its memory does not suffice.
        ExportError: E005 when the plan is damaged, or belongs to another machine, version or model.
    """

    thread_safe = True
    runtime = "trt"

    def __init__(
        self,
        plan: Path,
        meta: Mapping[str, Any],
        labels: LabelSpace,
        pixels: Pixels,
        *,
        device: int = 0,
        streams: int = 1,
        bundle: str = "",
        thresholds: Sequence[float] | None = None,
    ) -> None:
        if streams < 1:
            raise ValueError(f"streams must be at least 1, got {streams}")
        require_trt(f"the engine {plan.name}")
        self.plan, self.labels, self.pixels = plan, labels, pixels
        self.thresholds = least_scores(labels, thresholds)
        self.precision = str(meta.get("effective_precision") or meta.get("precision") or "")
        self._heard = Messages()
        self._gathering = threading.Lock()  # held while all lanes are taken out of the pool
        self._closing = threading.Lock()
        self._pool: SimpleQueue[_Lane | None] = SimpleQueue()
        self._bounds: weakref.WeakSet[TrtBound] = weakref.WeakSet()
        self._streams, self._device = streams, CudaDevice(device)
        with self._device.active(), listening(self._heard):
            data = check_plan(plan, meta, labels, machine(self._device), bundle)
            self._loaded: _Loaded | None = self._load(data, meta)
            self.max_batch = self._loaded.shapes.highest
            for _ in range(streams):
                self._pool.put(self._lane(self.max_batch))

    def _load(self, data: bytes, meta: Mapping[str, Any]) -> _Loaded:
        runtime = start_runtime(self._heard)
        if meta.get("version_compatible"):  # the lean runtime of the version that built it travels inside the plan
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise self._refused("to load it")
        try:
            shapes = shapes_of(engine)
        except ValueError as error:
            raise foreign(self.plan, str(error)) from error
        image, columns = (self.pixels.size, self.pixels.size, self.pixels.channels), self.labels.size
        if (shapes.image, shapes.columns) != (image, columns):
            made = f"it makes {shapes.columns} scores of images {shapes.image}"
            raise foreign(self.plan, f"{made}, and the model makes {columns} of {image}")
        facts = {name: meta[name] for name in ("tensorrt", "gpu", "layers", "profile") if name in meta}
        facts |= {"precision": self.precision, "cuda_graphs": "one for each batch size"}
        return _Loaded(engine, runtime, self._device, shapes, self._refused, threading.Lock(), facts)

    def _open(self) -> _Loaded:
        if self._loaded is None:
            raise closed(self.runtime)
        return self._loaded

    def _lane(self, rows: int) -> _Lane:
        try:
            return _Lane(self._open(), rows)
        except torch.OutOfMemoryError as error:
            raise self._no_memory(str(error).splitlines()[0]) from error

    def _refused(self, what: str) -> ImgclsError:
        if self._heard.out_of_memory:
            return self._no_memory(self._heard.summary())
        return foreign(self.plan, f"TensorRT refused {what}", why=self._heard.summary())

    def _no_memory(self, why: str) -> HardwareError:
        return HardwareError(
            "H002",
            f"the GPU has not the memory for {self.plan.name}",
            why=why,
            try_="imgcls-fast export --trt --max-batch 8",
        )

    def scores(self, pixels: Any) -> np.ndarray:
        """(N, K) float32 probabilities of (N, S, S, C) uint8 pixels, any N; waits for a free stream.

        Raises:
            ValueError: another shape or type.
            ExportError: E005 when TensorRT refuses.
        """
        pixels, shapes = np.asarray(pixels), self._open().shapes
        if pixels.dtype != np.uint8 or pixels.shape[1:] != shapes.image:
            wanted = ", ".join(map(str, shapes.image))
            raise ValueError(f"pixels must be uint8 (N, {wanted}), got {pixels.dtype} {pixels.shape}")
        lane = self._take()
        try:
            return self._on(lane, pixels)
        finally:
            self._pool.put(lane)

    def _on(self, lane: _Lane, pixels: np.ndarray) -> np.ndarray:
        with listening(self._heard):
            return score_in_parts(lane.scores, pixels, self.max_batch, self.labels.size, fixed=False)

    def _take(self) -> _Lane:
        lane = self._pool.get()
        if lane is None:
            self._pool.put(None)  # the next one asks too
            raise closed(self.runtime)
        return lane

    def _take_all(self) -> list[_Lane]:
        with self._gathering:  # two threads that each hold a part would wait for each other
            return [self._take() for _ in range(self._streams)]

    def warmup(self, n: int) -> None:
        """Make context and graph of batch size `n` on every stream."""
        lanes = self._take_all()
        try:
            for lane in lanes:
                for _ in range(2):  # TensorRT wants one plain run before a capture
                    self._on(lane, blank(self.pixels, n))
        finally:
            for lane in lanes:
                self._pool.put(lane)

    def bind(self, batch: int) -> TrtBound:
        """A batch size with device buffers and a stream of its own. See `base.Bound`.

        Raises:
            ValueError: `batch` is not in 1..max_batch.
        """
        if not 1 <= batch <= self.max_batch:
            raise ValueError(f"batch must be in 1..{self.max_batch}, got {batch}")
        with self._device.active(), listening(self._heard):
            bound = TrtBound(self._lane(max(batch, self._open().shapes.lowest)), batch)
        self._bounds.add(bound)
        return bound

    def facts(self) -> dict[str, Any]:
        """What `precision` was read from, by and for what the plan was built, and whether graphs are used."""
        return dict(self._open().facts)

    def close(self) -> None:
        """Wait for running calls, then free graphs, contexts, buffers and the engine, in this order."""
        with self._closing:
            if self._loaded is None:
                return
            for lane in [*self._take_all(), *(bound.lane for bound in self._bounds)]:
                lane.free()
            self._loaded = None
            self._pool.put(None)


class TrtBound:
    """A batch size in place on the GPU. See `base.Bound`."""

    def __init__(self, lane: _Lane, batch: int) -> None:
        self.lane, self._batch = lane, batch
        self.stream = lane.stream
        self.input: Tensor = lane.input[:batch]  # (batch, S, S, C) uint8
        self.output: Tensor = lane.output[:batch]  # (batch, K) float32
        for _ in range(2):  # so that the graph is there
            lane.launch(batch)
        self.wait()

    def replay(self) -> None:
        """Score what `input` holds into `output`; returns at once."""
        device = self.lane.on.device
        with device.active():
            device.follow(self.stream)
            self.lane.launch(self._batch)

    def wait(self) -> None:
        """Return when the last `replay` is done."""
        self.lane.on.device.wait(self.stream)


@dataclass
class _Size:
    """One batch size of a lane. A graph is tied to the state of the context that it was captured from: each size has its own."""

    context: trt.IExecutionContext
    runs: int = 0
    graph: Any = None
    capturable: bool = True


class _Lane:
    """A stream with its buffers; used by one thread at a time.

    All batch sizes use the same input and output memory, and their contexts share one block of scratch memory: they follow
    each other on one stream.
    """

    def __init__(self, loaded: _Loaded, rows: int) -> None:
        self._on: _Loaded | None = loaded
        device, shapes = loaded.device, loaded.shapes
        self.stream = device.stream()
        self.input = device.zeros((rows, *shapes.image), torch.uint8, self.stream)
        self.output = device.zeros((rows, shapes.columns), torch.float32, self.stream)
        self.sent = device.pinned((rows, *shapes.image), torch.uint8)
        self.fetched = device.pinned((rows, shapes.columns), torch.float32)
        self.scratch_bytes = loaded.engine.device_memory_size_v2
        self.scratch = device.zeros((max(1, self.scratch_bytes),), torch.uint8, self.stream)
        self.sizes: OrderedDict[int, _Size] = OrderedDict()

    @property
    def on(self) -> _Loaded:
        """The plan that it runs; RuntimeError after `free`."""
        if self._on is None:
            raise closed(TrtEngine.runtime)
        return self._on

    def scores(self, pixels: np.ndarray) -> np.ndarray:
        """(n, K) scores of at most `rows` images. Rows that pad the batch hold older images; their scores are not read."""
        n, device = len(pixels), self.on.device
        np.copyto(self.sent.numpy()[:n], pixels)
        with device.active():
            device.copy(self.input[:n], self.sent[:n], self.stream)
            self.launch(n)
            device.copy(self.fetched[:n], self.output[:n], self.stream)
            device.wait(self.stream)
        scores: np.ndarray = self.fetched[:n].numpy().copy()
        return scores

    def launch(self, n: int) -> None:
        """Put the work for `n` images on the stream: plainly the first time, captured the second, replayed from then on."""
        rows = max(n, self.on.shapes.lowest)
        if rows not in self.sizes:
            with self.on.making:
                self.sizes[rows] = self._new_size(rows)
        size = self.sizes[rows]
        self.sizes.move_to_end(rows)
        if size.runs == 1 and size.capturable:
            self._capture(size)
        if size.graph is None:
            self._enqueue(size.context)
        else:
            self.on.device.replay(size.graph, self.stream)
        size.runs += 1

    def _new_size(self, rows: int) -> _Size:
        import tensorrt as trt

        if len(self.sizes) >= _SIZES:
            self.on.device.wait(self.stream)
            self.sizes.popitem(last=False)[1].graph = None  # before its context
        refused = self.on.refused
        context = self.on.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise refused("to make an execution context")
        context.nvtx_verbosity = (
            trt.ProfilingVerbosity.NONE
        )  # the plan's detailed names would cost time in each enqueue
        context.set_device_memory(self.scratch.data_ptr(), self.scratch_bytes)
        shape = (rows, *self.on.shapes.image)
        if not context.set_input_shape(INPUT, shape):
            raise refused(f"the input shape {shape}")
        missing = context.infer_shapes()
        if missing:
            raise refused(f"to infer shapes: {', '.join(missing)} not known")
        found, wanted = dims_of(context.get_tensor_shape(OUTPUT)), (rows, self.on.shapes.columns)
        if found != wanted:
            raise refused(f"the output shape {wanted}: it gives {found}")
        for name, buffer in ((INPUT, self.input), (OUTPUT, self.output)):
            if not context.set_tensor_address(name, buffer.data_ptr()):
                raise refused(f"the address of {name}")
        return _Size(context)

    def _enqueue(self, context: trt.IExecutionContext) -> None:
        if not context.execute_async_v3(self.stream.cuda_stream):
            raise self.on.refused("to enqueue a batch")

    def _capture(self, size: _Size) -> None:
        try:
            with self.on.making:
                size.graph = self.on.device.capture(self.stream, partial(self._enqueue, size.context))
        except (ImgclsError, RuntimeError) as error:  # loops, or shapes that depend on data: run plainly
            size.capturable = False
            self.on.facts["cuda_graphs"] = f"none: {error}"

    def free(self) -> None:
        """Graphs first, then their contexts, then the memory that both used."""
        self.on.device.wait(self.stream)
        for size in self.sizes.values():
            size.graph = None
        self.sizes.clear()
        self._on = None
        self.input = self.output = self.scratch = self.sent = self.fetched = torch.empty(0)
