"""Operator calls and host reads of a piece of code, counted: on a GPU a call is a kernel, and a read waits for all."""

from collections import Counter
from contextlib import ExitStack
from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"}
"""Names in ``torch.Tensor`` that make the host wait for a tensor on a device."""
READING_OPERATORS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"}
"""Operators that do the same, also where torch calls them by itself."""
WITHOUT_KERNEL = {
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "split_with_sizes", "squeeze"),
    *("t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view"),
    *("empty", "empty_like", "empty_strided", "new_empty"),
}
"""Views, and memory that nothing is written to."""


class OperatorCalls(TorchDispatchMode):
    """``calls``: operators that compute or copy, by name. ``views``: operators without a kernel, which only take the
    host's time. ``reads``: tensors that the host looked into, each once, by the function or operator that did."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self._functions = _Reads(self.reads)
        self._stack = ExitStack()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        (self.views if name in WITHOUT_KERNEL else self.calls)[name] += 1
        if name in READING_OPERATORS and not self._functions.is_reading:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "OperatorCalls":
        self._stack.enter_context(self._functions)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()


class _Reads(TorchFunctionMode):
    def __init__(self, reads: "Counter[str]") -> None:
        super().__init__()
        self.reads = reads
        self.is_reading = False
        """True while a read is in progress, whose operators don't count again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in READS:
            return func(*args, **(kwargs or {}))
        self.reads[name] += 1
        self.is_reading = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.is_reading = False
