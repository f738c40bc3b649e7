"""Vectors and raw memory in numba code, as LLVM vector IR.

    v = load_floats(address, 32)          # 32 float32 lanes from an address
    word = bits_at_least(v, t)            # 32 comparisons as the bits of one uint32
    store(address, v * splat(2.0, 32))

LLVM cuts vectors into what the machine has (two zmm, four ymm or eight NEON registers for 32 floats), so one
source serves all instruction sets, without a compiler on the user's machine. Lane counts must be literals.
Addresses are int64; nothing is checked.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

INT32, INT64, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


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
    """An LLVM intrinsic, declared once a module."""
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _first_lanes(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """The mask of the first ``count`` lanes."""
    numbers = ir.Constant(ir.VectorType(INT32, lanes), list(range(lanes)))
    limit = spread(builder, builder.trunc(count, INT32), lanes)
    return builder.icmp_signed("<", numbers, limit)


def read_first(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, count: ir.Value) -> ir.Value:
    """A load of the first ``count`` lanes of a float vector; the others are 0 and not read."""
    return _read_masked(builder, address, kind, _first_lanes(builder, count, kind.count))


def _read_masked(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, mask: ir.Value) -> ir.Value:
    at = pointer(builder, address, kind)
    name = f"llvm.masked.load.v{kind.count}f32.p0"
    load = function(builder, name, kind, [at.type, INT32, mask.type, kind])
    return builder.call(load, [at, INT32(4), mask, ir.Constant(kind, None)])


def _suffix(vector: Vector) -> str:
    return f"v{vector.lanes}{'f32' if vector.element == types.float32 else 'i32'}"


def _loader(element: types.Type) -> Any:
    @intrinsic(prefer_literal=True)
    def load(typingctx: Any, address: Any, lanes: Any) -> Any:
        kind = Vector(element, lanes.literal_value)

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return read(builder, arguments[0], kind.llvm)

        return kind(types.int64, lanes), code

    return load


load_floats = _loader(types.float32)
load_ints = _loader(types.int32)


@intrinsic(prefer_literal=True)
def load_first_floats(typingctx: Any, address: Any, count: Any, lanes: Any) -> Any:
    """The first ``count`` of ``lanes`` floats; the others are 0 and not read."""
    kind = Vector(types.float32, lanes.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return read_first(builder, arguments[0], kind.llvm, arguments[1])

    return kind(types.int64, types.int64, lanes), code


@intrinsic(prefer_literal=True)
def load_floats_between(typingctx: Any, address: Any, low: Any, high: Any, lanes: Any) -> Any:
    """Lanes ``low`` to ``high - 1`` of the floats at an address; the others are 0 and not read."""
    kind = Vector(types.float32, lanes.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, low, high, _ = arguments
        below, above = (_first_lanes(builder, limit, kind.lanes) for limit in (low, high))
        return _read_masked(builder, address, kind.llvm, builder.and_(builder.not_(below), above))

    return kind(*[types.int64] * 3, lanes), code


@intrinsic
def store(typingctx: Any, address: Any, vector: Any) -> Any:
    """Write all lanes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        written = builder.store(arguments[1], pointer(builder, arguments[0], vector.llvm))
        written.align = 4
        return context.get_dummy_value()

    return types.void(types.int64, vector), code


@intrinsic
def store_first(typingctx: Any, address: Any, vector: Any, count: Any) -> Any:
    """Write the first ``count`` lanes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, value, count = arguments
        mask = _first_lanes(builder, count, vector.lanes)
        at = pointer(builder, address, vector.llvm)
        name = f"llvm.masked.store.{_suffix(vector)}.p0"
        write = function(builder, name, ir.VoidType(), [vector.llvm, at.type, INT32, mask.type])
        builder.call(write, [value, at, ir.Constant(INT32, 4), mask])
        return context.get_dummy_value()

    return types.void(types.int64, vector, types.int64), code


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


@intrinsic
def to_floats(typingctx: Any, vector: Any) -> Any:
    """int32 lanes as float32."""
    kind = Vector(types.float32, vector.lanes)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(arguments[0], kind.llvm)

    return kind(vector), code


@intrinsic
def magnitudes(typingctx: Any, vector: Any) -> Any:
    """Absolute values of float lanes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        fabs = function(builder, f"llvm.fabs.{_suffix(vector)}", vector.llvm, [vector.llvm])
        return builder.call(fabs, arguments)

    return vector(vector), code


@intrinsic
def total(typingctx: Any, vector: Any) -> Any:
    """Sum of float lanes, halves added to halves."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, lanes = arguments[0], vector.lanes
        while lanes > 1:
            lanes //= 2
            order = ir.VectorType(INT32, lanes)
            low = builder.shuffle_vector(value, value, ir.Constant(order, list(range(lanes))))
            high = builder.shuffle_vector(value, value, ir.Constant(order, list(range(lanes, 2 * lanes))))
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(INT32, 0))

    return types.float32(vector), code


@intrinsic
def bits_at_least(typingctx: Any, vector: Any, limits: Any) -> Any:
    """32 comparisons ``vector >= limits`` as the bits of an int32, lane 0 lowest; NaN gives 0."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fcmp_ordered(">=", *arguments), INT32)

    return types.int32(vector, limits), code


def _scalar_access(kind: types.Type, llvm: ir.Type) -> tuple[Any, Any]:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return read(builder, arguments[0], llvm)

        return kind(types.int64), code

    @intrinsic
    def write(typingctx: Any, address: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            written = builder.store(arguments[1], pointer(builder, arguments[0], llvm))
            written.align = 4
            return context.get_dummy_value()

        return types.void(types.int64, kind), code

    return load, write


load_int, store_int = _scalar_access(types.int32, INT32)
load_long, store_long = _scalar_access(types.int64, INT64)
load_float, store_float = _scalar_access(types.float32, FLOAT)


@intrinsic
def address_of(typingctx: Any, record: Any) -> Any:
    """A C pointer as an int64."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], INT64)

    return types.int64(record), code


@intrinsic
def next_item(typingctx: Any, counter: Any) -> Any:
    """Take the next number from an int64 that all threads share; ordered as :func:`add_to_shared`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = pointer(builder, arguments[0], INT64)
        return builder.atomic_rmw("add", at, ir.Constant(INT64, 1), "acq_rel")

    return types.int64(types.int64), code


@intrinsic
def joined(typingctx: Any, record: Any, found_work: Any) -> Any:
    """At a kernel's end: count this thread among the job's workers if it found any work."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.add(builder.ptrtoint(arguments[0], INT64), INT64(8))
        amount = builder.zext(arguments[1], INT64)
        builder.atomic_rmw("add", pointer(builder, address, INT64), amount, "monotonic")
        return context.get_dummy_value()

    return types.void(record, types.boolean), code


@intrinsic
def add_to_shared(typingctx: Any, address: Any, amount: Any) -> Any:
    """Add to an int64 that all threads share; gives what it was before.

    What this thread wrote before is seen by whoever adds afterwards.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, arguments[0], INT64), arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), code


@intrinsic
def load_shared(typingctx: Any, address: Any) -> Any:
    """An int64 that other threads change; what they wrote before they did is seen from here on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(pointer(builder, arguments[0], INT64), "acquire", 8)

    return types.int64(types.int64), code


@intrinsic
def replace_shared(typingctx: Any, address: Any, before: Any, after: Any) -> Any:
    """Make an int64 that all threads share ``after`` if it is ``before``; ordered as
    :func:`add_to_shared`.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, before, after = arguments
        builder.cmpxchg(pointer(builder, address, INT64), before, after, "acq_rel", "acquire")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


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


@intrinsic
def call(typingctx: Any, function: Any, argument: Any) -> Any:
    """Call the C function at an address with one int64 (or pointer), and forget what it gives."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [INT64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


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
