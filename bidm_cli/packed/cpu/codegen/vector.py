"""Vectors and raw memory access in numba code, as LLVM vector IR.

    v = load_floats(address, 32)          # 32 float32 lanes from an address
    word = bits_at_least(v, t)            # 32 comparisons as the bits of one uint32
    store(address, v * splat(2.0, 32))

LLVM cuts vectors into the machine's registers (two zmm, four ymm or eight NEON registers for 32 floats), so
one source serves all instruction sets, without a compiler on the user's machine. Lane counts must be
literals. Addresses are int64; nothing is checked.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

from bidm_cli.packed.cpu.codegen.isa import target

INT32, INT64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_OCTETS = ir.VectorType(ir.IntType(8), 32)


class Vector(types.Type):
    """``lanes`` values of float32 or int32."""

    def __init__(self, element: types.Type, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"Vector({element}, {lanes})")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(FLOAT if self.element == types.float32 else INT32, self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


def pointer(builder: ir.IRBuilder, address: ir.Value, to: ir.Type) -> ir.Value:
    """An int64 address as an LLVM pointer."""
    return builder.inttoptr(address, to.as_pointer())


def read(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """A load that only assumes 4-byte alignment."""
    value = builder.load(pointer(builder, address, kind))
    value.align = 4
    return value


def spread(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """The vector with ``value`` in all lanes."""
    kind = ir.VectorType(value.type, lanes)
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT32, lanes), [0] * lanes))


def function(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Value:
    """Declare an LLVM intrinsic, once per module."""
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _first_lanes(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """The mask of the first ``count`` lanes."""
    numbers = ir.Constant(ir.VectorType(INT32, lanes), list(range(lanes)))
    limit = spread(builder, builder.trunc(count, INT32), lanes)
    return builder.icmp_signed("<", numbers, limit)


def read_first(builder: ir.IRBuilder, address: ir.Value, count: ir.Value, kind: ir.Type) -> ir.Value:
    """A load of the first ``count`` lanes of a float vector; the others are 0 and not read."""
    return _read_masked(builder, address, kind, _first_lanes(builder, count, kind.count))


def _read_masked(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, mask: ir.Value) -> ir.Value:
    at = pointer(builder, address, kind)
    name = f"llvm.masked.load.v{kind.count}f32.p0"
    load = function(builder, name, kind, [at.type, INT32, mask.type, kind])
    return builder.call(load, [at, INT32(4), mask, ir.Constant(kind, None)])


def _suffix(kind: ir.VectorType) -> str:
    return f"v{kind.count}{'f32' if kind.element == FLOAT else 'i32'}"


def emitted(signature: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: make a numba intrinsic of a function (builder, LLVM values) that emits its code.

    ``signature`` gives the intrinsic's numba signature from the types of its arguments.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        def define(typingctx: Any, *arguments: Any) -> Any:
            def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                result = emit(builder, *values)
                return context.get_dummy_value() if result is None else result

            return signature(*arguments), code

        return intrinsic(functools.wraps(emit)(define))

    return decorate


def _loader(element: types.Type, emit: Callable[..., Any]) -> Any:
    """Intrinsic (int64 values, literal lanes) -> vector of a function (builder, values, LLVM type)."""

    def define(typingctx: Any, *arguments: Any) -> Any:
        *numbers, lanes = arguments
        kind = Vector(element, lanes.literal_value)

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return emit(builder, *values[:-1], kind.llvm)

        return kind(*(types.int64 for _ in numbers), lanes), code

    return intrinsic(prefer_literal=True)(functools.wraps(emit)(define))


def _read_between(b: ir.IRBuilder, address: ir.Value, low: ir.Value, high: ir.Value, kind: ir.Type) -> Any:
    """A load of lanes ``low`` to ``high - 1`` of a float vector; the others are 0 and not read."""
    below, above = (_first_lanes(b, limit, kind.count) for limit in (low, high))
    return _read_masked(b, address, kind, b.and_(b.not_(below), above))


load_floats, load_ints = _loader(types.float32, read), _loader(types.int32, read)
load_first_floats = _loader(types.float32, read_first)
load_floats_between = _loader(types.float32, _read_between)


@emitted(lambda address, vector: types.void(types.int64, vector))
def store(b: Any, address: Any, vector: Any) -> None:
    """Write all lanes."""
    b.store(vector, pointer(b, address, vector.type)).align = 4


@emitted(lambda address, vector, count: types.void(types.int64, vector, types.int64))
def store_first(b: Any, address: Any, vector: Any, count: Any) -> None:
    """Write the first ``count`` lanes."""
    kind, at = vector.type, pointer(b, address, vector.type)
    mask = _first_lanes(b, count, kind.count)
    name = f"llvm.masked.store.{_suffix(kind)}.p0"
    write = function(b, name, ir.VoidType(), [kind, at.type, INT32, mask.type])
    b.call(write, [vector, at, ir.Constant(INT32, 4), mask])


@intrinsic(prefer_literal=True)
def splat(typingctx: Any, value: Any, lanes: Any) -> Any:
    """A float32 or int32 in all lanes."""
    element = types.float32 if isinstance(value, types.Float) else types.int32
    kind = Vector(element, lanes.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return spread(builder, arguments[0], kind.lanes)

    return kind(element, lanes), code


def _arithmetic(python: Any, on_floats: str, on_ints: str) -> None:
    @intrinsic
    def combine(typingctx: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            name = on_floats if a.element == types.float32 else on_ints
            return getattr(builder, name)(*arguments)

        return a(a, b), code

    def implementation(a: Any, b: Any) -> Any:
        return combine(a, b)

    @overload(python)
    def operate(a: Any, b: Any) -> Any:
        return implementation if isinstance(a, Vector) and a == b else None


_arithmetic(operator.add, "fadd", "add")
_arithmetic(operator.sub, "fsub", "sub")
_arithmetic(operator.mul, "fmul", "mul")
_arithmetic(operator.truediv, "fdiv", "sdiv")


@emitted(lambda vector: Vector(types.float32, vector.lanes)(vector))
def to_floats(b: Any, vector: Any) -> Any:
    """int32 lanes as float32."""
    return b.sitofp(vector, ir.VectorType(FLOAT, vector.type.count))


@emitted(lambda vector: vector(vector))
def magnitudes(b: Any, vector: Any) -> Any:
    """Absolute values of float lanes."""
    return b.call(function(b, f"llvm.fabs.{_suffix(vector.type)}", vector.type, [vector.type]), [vector])


def reduced(b: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """One lane from all of them, halves combined with halves."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        halves = [list(range(lanes)), list(range(lanes, 2 * lanes))]
        order = ir.VectorType(INT32, lanes)
        vector = combine(*(b.shuffle_vector(vector, vector, ir.Constant(order, half)) for half in halves))
    return b.extract_element(vector, ir.Constant(INT32, 0))


@emitted(lambda vector: types.float32(vector))
def total(b: Any, vector: Any) -> Any:
    """Sum of float lanes."""
    return reduced(b, vector, b.fadd)


@emitted(lambda vector, limits: types.int32(vector, limits))
def bits_at_least(b: Any, vector: Any, limits: Any) -> Any:
    """32 comparisons ``vector >= limits`` as the bits of an int32, lane 0 lowest; NaN gives 0."""
    return b.bitcast(b.fcmp_ordered(">=", vector, limits), INT32)


@emitted(lambda word, into: types.void(types.int32, types.int64))
def store_bits_as_bytes(b: Any, word: Any, into: Any) -> None:
    """Write the 32 bits of an int32 as bytes 0 and 1, the lowest one first."""
    bits = b.bitcast(word, ir.VectorType(ir.IntType(1), 32))
    b.store(b.zext(bits, _OCTETS), pointer(b, into, _OCTETS)).align = 4


@emitted(lambda source, into: types.void(types.int64, types.int64))
def copy_64_bytes(b: Any, source: Any, into: Any) -> None:
    """Copy from one address to another."""
    octets = ir.VectorType(ir.IntType(8), 64)
    b.store(read(b, source, octets), pointer(b, into, octets)).align = 4


@emitted(lambda z, offsets: z(z, offsets))
def rest_of(b: Any, z: Any, offsets: Any) -> Any:
    """Rest of z after its signs: z - offset where z >= 0, z + offset elsewhere (NaN stays)."""
    positive = b.fcmp_ordered(">=", z, ir.Constant(z.type, None))
    return b.select(positive, b.fsub(z, offsets), b.fadd(z, offsets))


def _scalar_access(kind: types.Type, llvm: ir.Type) -> tuple[Any, Any]:
    @emitted(lambda address: kind(types.int64))
    def load(b: Any, address: Any) -> Any:
        return read(b, address, llvm)

    @emitted(lambda address, value: types.void(types.int64, kind))
    def write(b: Any, address: Any, value: Any) -> None:
        b.store(value, pointer(b, address, llvm)).align = 4

    return load, write


load_int, store_int = _scalar_access(types.int32, INT32)
load_long, store_long = _scalar_access(types.int64, INT64)
load_float, store_float = _scalar_access(types.float32, FLOAT)


@emitted(lambda record: types.int64(record))
def address_of(b: Any, record: Any) -> Any:
    """A C pointer as an int64."""
    return b.ptrtoint(record, INT64)


@emitted(lambda counter: types.int64(types.int64))
def arrive(b: Any, counter: Any) -> Any:
    """Take the next number from an int64 that all threads share; ordered as :func:`add_to_shared`."""
    return b.atomic_rmw("add", pointer(b, counter, INT64), ir.Constant(INT64, 1), "acq_rel")


@emitted(lambda record, found_work: types.void(record, types.boolean))
def join(b: Any, record: Any, found_work: Any) -> None:
    """Count this thread among a launch's workers if it found any work."""
    workers = b.add(b.ptrtoint(record, INT64), INT64(8))
    b.atomic_rmw("add", pointer(b, workers, INT64), b.zext(found_work, INT64), "monotonic")


@emitted(lambda record, count: types.int64(record, types.int64))
def next_item(b: Any, record: Any, count: Any) -> Any:
    """Take one of ``count`` items that is left, or ``count`` if none is; ordered as :func:`add_to_shared`.

    Cores of even numbers take items from the first one on, others from the last one back: of one kernel after
    the other a core has the same part, which its cache may still hold.
    """
    half = INT64(32)
    from_end = b.trunc(_core(b), ir.IntType(1))
    taken = b.select(from_end, b.shl(INT64(1), half), INT64(1))
    before = b.atomic_rmw("add", pointer(b, b.ptrtoint(record, INT64), INT64), taken, "acq_rel")
    first, last = b.and_(before, INT64(2**32 - 1)), b.lshr(before, half)
    item = b.select(from_end, b.sub(b.sub(count, INT64(1)), last), first)
    return b.select(b.icmp_signed("<", b.add(first, last), count), item, count)


def _core(b: ir.IRBuilder) -> ir.Value:
    """Number of the core that this thread runs on; 0 where no instruction tells."""
    triple, _, features = target()
    if triple.startswith(("x86", "i686")) and "+rdpid" in features.split(","):
        return b.call(function(b, "llvm.x86.rdpid", INT32, []), [])
    return INT32(0)


@njit(inline="always", error_model="numpy")
def first_item(record: Any, count: Any) -> Any:
    """Take a thread's first of ``count`` items; further ones are :func:`next_item`."""
    item = next_item(record, count)
    join(record, item < count)
    return item


@emitted(lambda address, amount: types.int64(types.int64, types.int64))
def add_to_shared(b: Any, address: Any, amount: Any) -> Any:
    """Add to an int64 that all threads share; returns its value before.

    A thread that adds later sees what this one wrote before.
    """
    return b.atomic_rmw("add", pointer(b, address, INT64), amount, "acq_rel")


@emitted(lambda address: types.int64(types.int64))
def load_shared(b: Any, address: Any) -> Any:
    """Load an int64 that other threads change; what they wrote before they did is seen from here on."""
    return b.load_atomic(pointer(b, address, INT64), "acquire", 8)


@emitted(lambda address, before, after: types.void(types.int64, types.int64, types.int64))
def replace_shared(b: Any, address: Any, before: Any, after: Any) -> None:
    """Make a shared int64 ``after`` if it is ``before``; ordered as :func:`add_to_shared`."""
    b.cmpxchg(pointer(b, address, INT64), before, after, "acq_rel", "acquire")


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the processor that this thread waits in a loop, for the sake of the other thread on its core."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        triple = context.codegen().magic_tuple()[0]
        if triple.startswith(("x86", "i686")):
            builder.call(function(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        elif triple.startswith(("aarch64", "arm64")):
            builder.call(function(builder, "llvm.aarch64.hint", ir.VoidType(), [INT32]), [INT32(1)])
        return context.get_dummy_value()

    return types.void(), code


@emitted(lambda function, argument: types.void(types.int64, types.int64))
def call(b: Any, function: Any, argument: Any) -> None:
    """Call the C function at an address with one int64 (or pointer), and ignore its result."""
    kind = ir.FunctionType(ir.VoidType(), [INT64])
    b.call(b.inttoptr(function, kind.as_pointer()), [argument])


@intrinsic(prefer_literal=True)
def stack_bytes(typingctx: Any, count: Any) -> Any:
    """The address of ``count`` (a literal) bytes on the stack, 64-byte aligned."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # Not cgutils.alloca_once: it fills the space with zeros, byte by byte for the optimizer, which takes
        # seconds to minutes over that.
        with builder.goto_entry_block():
            space = builder.alloca(ir.ArrayType(ir.IntType(8), count.literal_value))
        space.align = 64
        return builder.ptrtoint(space, INT64)

    return types.int64(count), code
