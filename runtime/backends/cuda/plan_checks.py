"""What a plan file must be before it runs: its names exist by then, its extents and numbers are possible.

Whether arrays fit what a step does with them is said by whoever does it, once their shapes are known.
"""

from collections.abc import Iterator

from runtime.backends.cuda.plan import COUNTS, FLAGS, Plan
from runtime.errors import EngineError
from runtime.specs import StageSpec, symbol_of

REBUILD = "rebuild the bundle with `wanrt build-engines --target cuda`"
_MOST = 2**31 - 1  # kernels count rows and columns in 32 bits


def check_plan(plan: Plan, stage: StageSpec) -> None:
    """Check a plan, as read from its file, against the stage it is for.

    Raises:
        EngineError: it uses what does not exist, names something twice, or holds numbers that mean nothing.
    """
    for problem in (*_bad_numbers(plan, stage), *_bad_names(plan, stage)):
        raise EngineError(f"{stage.name}: {problem}", hint=REBUILD)


def view_roots(plan: Plan) -> dict[str, str]:
    """The array that each view is a part of, however many views lie between."""
    roots: dict[str, str] = {}
    for view in plan.views:
        roots[view.name] = roots.get(view.source, view.source)
    return roots


def _bad_names(plan: Plan, stage: StageSpec) -> Iterator[str]:
    given = {tensor.name for tensor in (*stage.inputs, *stage.weights)}
    buffers = {buffer.name for buffer in plan.buffers}
    names = {*given, *buffers}
    if len(names) < len(given) + len(plan.buffers):
        yield "the plan has a buffer with the name of another array"
    for view in plan.views:
        if view.name in names or view.source not in names:
            yield f"the plan's view {view.name} has another array's name, or is of {view.source}, which does not exist"
        names.add(view.name)
    roots, known = view_roots(plan), set(given)
    for step in plan.steps:
        missing = [name for name in step.inputs.values() if roots.get(name, name) not in known]
        missing += [name for name in step.outputs.values() if name not in buffers]
        if missing:
            yield f"the plan uses {missing[0]}, which does not exist by then"
        known |= set(step.outputs.values())
    made = all(roots.get(name, name) in known for name in plan.outputs.values())
    if {tensor.name for tensor in stage.outputs} != plan.outputs.keys() or not made:
        yield f"the plan's outputs are {sorted(plan.outputs)}"


def _bad_numbers(plan: Plan, stage: StageSpec) -> Iterator[str]:
    for buffer in plan.buffers:
        for axis in buffer.shape:
            try:
                factor, symbol = (axis, None) if isinstance(axis, int) else symbol_of(axis)
            except ValueError:
                factor, symbol = -1, None
            if not 0 <= factor <= _MOST or (symbol is not None and symbol not in stage.symbols):
                yield f"the plan's buffer {buffer.name} has an extent of {axis}"
        if not buffer.shape or not 1 <= buffer.row_multiple <= _MOST:
            yield f"the plan's buffer {buffer.name} has no rows, or a multiple of {buffer.row_multiple} of them"
    for view in plan.views:
        if view.axis not in (0, 1):
            yield f"the plan's view {view.name} is along axis {view.axis}"
    for step in plan.steps:
        for name, value in step.numbers.items():
            if name in FLAGS and value not in (0, 1):
                yield f"the plan's {step.kind} has {name}={value}, expected 0 or 1"
            if name in COUNTS and not (value.is_integer() and COUNTS[name] <= value <= _MOST):
                yield f"the plan's {step.kind} has {name}={value}, expected a whole number from {COUNTS[name]} on"
