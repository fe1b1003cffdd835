"""The kinds of tasks, by name."""

from hft_megatron.evaluation.kinds.choose import Choose
from hft_megatron.evaluation.kinds.generate import Generate
from hft_megatron.evaluation.kinds.kind import Kind
from hft_megatron.evaluation.kinds.preference import PreferencePairs
from hft_megatron.evaluation.kinds.text import Documents
from hft_megatron.evaluation.tasks import TaskKind

_ALL: tuple[Kind, ...] = (Generate(), Choose(), Documents(), PreferencePairs())
KINDS: dict[TaskKind, Kind] = {kind.name: kind for kind in _ALL}
