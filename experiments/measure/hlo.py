"""What a compiled program does, read from XLA's text of it: operations, flops, bytes, collectives.

The text is scheduled HLO, as ``jax.stages.Compiled.as_text`` has it. XLA's own cost analysis counts
the body of a loop once; here loops are multiplied out. Nothing is run, so these are readings, not
measurements.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "token": 0, "opaque": 0}
COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
# What takes no time of its own: names of values, and what only holds other operations.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"}
FREE |= {"after-all", "add-dependency", "partition-id", "replica-id", "iota", "domain"}
FREE |= {"while", "conditional", "call", "async-start", "async-update", "async-done"}
SLICES = ("slice", "dynamic-slice", "gather")
# What has an element of its result depend on several of what it takes, whatever the sizes.
MIXES = {"convolution", "dot", "custom-call", "dynamic-update-slice", "scatter", "sort", "fft"}
MIXES |= {"reduce", "reduce-window", "select-and-scatter", "cholesky", "triangular-solve", "tuple"}
MIXES |= {"fusion", "call"}
_NAME = r"%([\w.\-]+)"


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array in HLO text, such as f32[8,16]{1,0:T(8,128)S(1)}.

    Attributes:
      dtype: XLA's name.
      dims: sizes.
      order: dimensions from the fastest to the slowest.
      tile: sizes that the fastest dimensions are padded to a multiple of, the fastest last.
      space: where it lies: 0 is the device's memory, 1 on a TPU its vector memory.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def bytes(self) -> int:
        """Without padding."""
        return prod(self.dims) * BYTES.get(self.dtype, 4)

    @property
    def padded(self) -> int:
        """Bytes with each tiled dimension filled up to whole tiles."""
        sizes = [self.dims[d] for d in self.order]
        for place, tile in enumerate(self.tile[::-1][: len(sizes)]):
            sizes[place] = -(-sizes[place] // tile) * tile
        return prod(sizes) * BYTES.get(self.dtype, 4)


def shapes(text: str) -> list[Shape]:
    """All arrays that a piece of HLO text names, those of tuples one by one."""
    found = []
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text):
        order, _, rest = layout.partition(":")
        tile, space = re.search(r"T\(([\d,]+)\)", rest), re.search(r"S\((\d+)\)", rest)
        sizes = _numbers(dims)
        found.append(
            Shape(
                dtype,
                sizes,
                _numbers(order) or tuple(range(len(sizes)))[::-1],
                _numbers(tile[1]) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text: %name = result op(arguments), attributes."""

    name: str
    result: list[Shape]
    op: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of what it takes."""
        return re.findall(_NAME, self.arguments)

    def called(self, *kinds: str) -> list[str]:
        """The computations it names as one of these ("calls", "body"), with or without braces."""
        names = rf"(?:{'|'.join(kinds)})=(?:\{{([^}}]*)\}}|({_NAME}))"
        texts = [a or b for a, b, _ in re.findall(names, self.attributes)]
        return [name for text in texts for name in re.findall(_NAME, text)]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each its instructions by name, the root last; and the entry's name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def trips(self, loop: Instruction) -> int | None:
        """How often a while loop goes round; None if the text does not tell."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        bounds = [
            int(i.arguments)
            for name in loop.called("condition")
            for _, i, _, _ in self.walk(name)
            if i.op == "constant" and i.arguments.isdigit()
        ]
        return max(bounds) if bounds else None

    def walk(
        self, name: str, times: int = 1, fused: bool = False
    ) -> Iterator[tuple[dict[str, Instruction], Instruction, int, bool]]:
        """Every instruction, with its neighbours by name, how often it runs, if inside a fusion.

        Of a conditional's branches each counts as taken; a loop that does not tell, once.
        """
        local = self.computations[name]
        for i in local.values():
            yield local, i, times, fused
            inside = i.called("calls", "body", "branch_computations", "true_computation")
            inside += i.called("false_computation") + (i.called("to_apply") * (i.op == "call"))
            trips = self.trips(i) or 1 if i.op == "while" else 1
            for other in inside:
                yield from self.walk(other, times * trips, fused or i.op == "fusion")


def parse(text: str) -> Program:
    """Reads a module's text."""
    found: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(rf"(ENTRY )?{_NAME} \(", line)
        if head and line.endswith("{"):
            current = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (start := re.match(rf"\s+(?:ROOT )?{_NAME} = ", line)):
            space = _until(line, start.end(), " ")
            opens = line.index("(", space)
            closes = _until(line, opens + 1, ")")
            current[start[1]] = Instruction(
                start[1],
                shapes(line[start.end() : space]),
                line[space + 1 : opens],
                line[opens + 1 : closes],
                line[closes + 1 :],
            )
    if not entry:
        raise ValueError("this is no HLO text: it has no ENTRY")
    return Program(found, entry)


def _until(text: str, start: int, stop: str) -> int:
    """Where ``stop`` comes first that is in no bracket opened after ``start``."""
    depth = 0
    for place in range(start, len(text)):
        if depth == 0 and text[place] == stop:
            return place
        depth += (text[place] in "([{") - (text[place] in ")]}")
    return len(text)


def product_flops(
    i: Instruction, local: dict[str, Instruction]
) -> tuple[str, int] | tuple[None, int]:
    """(types of a convolution or matrix product, 2 x its multiplications); (None, 0) of others.

    Multiplications by padding and by the zeros of a dilation do not count. A product that asks for
    more than the least precision has it in its types: "f32 x f32 -> f32 highest".
    """
    target = re.search(r'custom_call_target="([^"]*)"', i.attributes)
    convolution, cudnn = i.op == "convolution", bool(target) and "__cudnn$conv" in target[1]
    gemm = bool(target) and target[1].startswith("__cublas$")
    if not (convolution or cudnn or gemm or i.op == "dot"):
        return None, 0
    left, right = (local[name].result[0] for name in i.operands[:2])
    out = i.result[0]
    asked = re.search(r"operand_precision=\{(\w+)", i.attributes)
    precision = f" {asked[1]}" if asked and asked[1] != "default" else ""
    types = f"{left.dtype} x {right.dtype} -> {out.dtype}{precision}"
    if convolution or cudnn:
        # cuDNN's gradients name window and dimensions as the forward convolution has them.
        if target and "BackwardInput" in target[1]:
            left, out = out, left
        elif target and "BackwardFilter" in target[1]:
            right, out = out, right
        return types, convolution_flops(i.attributes, left, right, out)
    pattern = r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]'
    summed = re.search(pattern, i.attributes)
    dims = _numbers(summed[1].replace('"', "")) if summed else ()
    return types, 2 * prod(out.dims) * prod(left.dims[d] for d in dims)


def convolution_flops(attributes: str, left: Shape, right: Shape, out: Shape) -> int:
    """2 x the multiplications of a convolution that meet no padding and no hole of a dilation."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    window = re.search(r"window=\{([^}]*)\}", attributes)
    assert labels
    parts = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[1] if label.isdigit())

    def per(name: str, default: str) -> list[str]:
        return parts[name].split("x") if name in parts else [default] * len(spatial)

    taps = 1
    columns = [per(*c) for c in (("size", "1"), ("stride", "1"), ("pad", "0_0"))]
    columns += [per(*c) for c in (("lhs_dilate", "1"), ("rhs_dilate", "1"))]
    for label, size, stride, pad, base, dilation in zip(spatial, *columns, strict=True):
        n, results = left.dims[labels[1].index(label)], out.dims[labels[3].index(label)]
        at = np.arange(results)[:, None] * int(stride) - int(pad.split("_")[0])
        at = at + np.arange(int(size))[None] * int(dilation)
        taps *= int(np.sum((at % int(base) == 0) & (at >= 0) & (at // int(base) < n)))
    inputs = right.dims[labels[2].index("i")]
    return 2 * taps * out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")] * inputs


def memory_bytes(program: Program, i: Instruction, local: dict[str, Instruction]) -> int:
    """Bytes that an operation reads from the device's memory and writes to it, with padding.

    Of an array that is only sliced, or updated in place, what is taken or put counts.
    """
    if i.op.endswith(("-done", "-update")):
        return 0  # counted where it starts
    bodies = i.called("calls")
    body = program.computations[bodies[0]] if i.op == "fusion" and bodies else None
    results = i.result
    if i.op == "copy-start":  # (to, from, context)
        results = results[:1]
    elif i.op.endswith("slice-start"):  # ((from), to, context)
        results = results[1:2]
    if body is None and i.op.removesuffix("-start") in SLICES:
        source, (out, *_) = local[i.operands[0]].result[0], results
        return out.padded * ((source.space == 0) + (out.space == 0))
    updated = _updated(body, i, local)
    total = sum(s.padded for s in results if s.space == 0)
    for number, name in enumerate(i.operands):
        if name not in local:
            continue
        taken = _taken(body, number) if body is not None else None
        for s in local[name].result:
            if s.space == 0:
                total += s.padded if taken is None else min(round(taken), s.padded)
    for whole, part in updated:  # not read, and written but for the part
        total -= 2 * whole - part
    return max(total, 0)


def _taken(body: dict[str, Instruction], number: int) -> float | None:
    """Bytes a fusion reads of its parameter, if it only takes slices of it; None: all.

    What is done to the whole element by element before it is sliced is done to the slices alone.
    """
    own = [i for i in body.values() if i.op == "parameter" and i.arguments == str(number)]
    slices = _slices(body, own[0]) if own else None
    if not slices:
        return None
    taken = [body[name].result[0] for name in slices]
    elements = sum(s.padded / BYTES.get(s.dtype, 4) for s in taken)
    return elements * BYTES.get(own[0].result[0].dtype, 4)


def _slices(body: dict[str, Instruction], i: Instruction) -> set[str] | None:
    """The slices in a fusion by which alone a result is used, by name; None: it is not so."""
    found: set[str] = set()
    users = [user for user in body.values() if i.name in user.operands]
    for user in users:
        if user.op in SLICES and user.operands[0] == i.name:
            found.add(user.name)
            continue
        if user.op in MIXES or prod(user.result[0].dims) != prod(i.result[0].dims):
            return None
        further = _slices(body, user)
        if further is None:
            return None
        found |= further
    return found if users else None


def _updated(
    body: dict[str, Instruction] | None, i: Instruction, local: dict[str, Instruction]
) -> list[tuple[int, int]]:
    """(bytes of the whole, of what is put) for each array that is updated in place."""
    found = []
    within = [(i, local)] if body is None else [(each, body) for each in body.values()]
    for each, neighbours in within:
        if each.op != "dynamic-update-slice" or len(each.operands) < 2:
            continue
        whole, part = (neighbours.get(name) for name in each.operands[:2])
        in_place = body is None or (whole and whole.op == "parameter")
        if in_place and part and each.result[0].space == 0:
            found.append((each.result[0].padded, part.result[0].padded))
    return found


def overlaps(i: Instruction, local: dict[str, Instruction]) -> bool:
    """Whether something else is scheduled between an operation's start and its end."""
    names = list(local)
    later = names[names.index(i.name) + 1 :]
    for name in later if i.op.endswith("-start") else ():
        other = local[name]
        if i.name in other.operands:
            return False
        if other.op not in FREE and not other.op.endswith(("-start", "-update", "-done")):
            return True
    return False


def read(text: str, count: int = 1) -> dict[str, Any]:
    """What a program of ``count`` steps does in one of them, on one device.

    Returns:
      ``operations``: launched one after the other; on a GPU, kernels. ``gflop``: of convolutions
      and matrix products, 10^9. ``products``: 10^9 flops by types. ``gb``: 10^9 bytes read from
      and written to the device's memory. ``mcycles``: 10^6 cycles by kind, where the compiler wrote
      an estimate beside its operations; it is for what computes, without collectives and waiting.
      ``collectives``: by kind, calls, those of them that other work is scheduled beside, and 10^6
      bytes.
      ``padding``: bytes of all results with padding, over those without. ``unknown_loops``: those
      that counted once since the text does not say how often they go round.
    """
    program = parse(text)
    flops, cycles = Counter[str](), Counter[str]()
    collectives: dict[str, Counter[str]] = defaultdict(Counter)
    moved = operations = padded = unpadded = unknown = 0
    multiplies = {
        name: any(i.op in ("convolution", "dot") for i in body.values())
        for name, body in program.computations.items()
    }
    for local, i, times, fused in program.walk(program.entry):
        types, amount = product_flops(i, local)
        if types:
            flops[types] += times * amount
        if i.op == "while":
            unknown += program.trips(i) is None
        if fused or i.op in FREE:
            continue
        moved += times * memory_bytes(program, i, local)
        if estimate := re.search(r'"estimated_cycles":"(\d+)"', i.attributes):
            heavy = types or any(multiplies[name] for name in i.called("calls"))
            kind = "convolutions" if heavy else "other fusions" if i.op == "fusion" else i.op
            cycles[kind] += times * int(estimate[1])
        if i.op.endswith(("-done", "-update")):
            continue
        operations += times
        kind = i.op.removesuffix("-start")
        if kind in COLLECTIVES:
            payload = sum(s.bytes for name in i.operands for s in local[name].result)
            collectives[kind] += Counter(
                calls=times, overlapped=times * overlaps(i, local), bytes=times * payload
            )
        padded += times * sum(s.padded for s in i.result)
        unpadded += times * sum(s.bytes for s in i.result)
    return {
        "operations": operations / count,
        "gflop": flops.total() / count / 1e9,
        "products": {name: n / count / 1e9 for name, n in flops.most_common()},
        "gb": moved / count / 1e9,
        "mcycles": {name: n / count / 1e6 for name, n in cycles.most_common()},
        "collectives": {
            kind: {
                "calls": each["calls"] / count,
                "overlapped": each["overlapped"] / count,
                "mb": each["bytes"] / count / 1e6,
            }
            for kind, each in collectives.items()
        },
        "padding": padded / max(1, unpadded),
        "unknown_loops": unknown,
    }
