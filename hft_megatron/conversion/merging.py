"""Half-Reset and weight averages: two Hugging Face folders in, one or several out, tensor by tensor.

No training, no ranks and no model: at most one tensor of each folder and their result are in memory.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.kept_files import NewFolder, keep_files
from hft_megatron.conversion.load import check_weights
from hft_megatron.conversion.merge_inputs import MergeInputs, place_of
from hft_megatron.conversion.save import Announce
from hft_megatron.conversion.shard_writer import ShardWriter
from hft_megatron.conversion.weight_files import notes_on_folder
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan
from hft_megatron.hft.units import units_of
from hft_megatron.model.parameter_names import whole_shape

HALF_RESET_FILE = "half_reset.json"
"""The plan of a Half-Reset, in the form that --hft-plan reads."""
AVERAGE = "average"

Combine = Callable[[str, HuggingFaceWeights, HuggingFaceWeights], Iterable[Tensor]]
"""Takes a tensor's name and the opened folders, tuned and base; yields one tensor of their common shape per output
folder, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One output folder."""

    record: tuple[str, str]
    """Name and text of the file that records how it was made."""
    metadata: Mapping[str, str]
    """Metadata for the headers of its weight files."""
    place: str = ""
    """Its name in --output; --output itself when empty."""


def half_reset(inputs: MergeInputs, plan: Plan, announce: Announce) -> None:
    """Writes the tuned model with the weights that ``plan`` freezes reset to the base's, bit for bit.

    The pilot of arXiv 2404.18466 resets a random half of each layer's attention, feed-forward and norm weights, by the
    rule that HFT freezes by. It does not say what becomes of embedding, final norm and head. Here they follow the plan
    like all other weights, and a plan by HFT's rule trains them, so they keep the tuned value.

    ``plan`` must be one of the inputs' shape. Raises UserError for folders that don't hold what their config.json asks
    for, and for a value that the tuned model's data type cannot hold.
    """
    trains = {f"{unit.name}.weight": plan.trains(unit.name) for unit in plan.units}

    def pick(name: str, tuned: HuggingFaceWeights, base: HuggingFaceWeights) -> Iterator[Tensor]:
        yield (tuned if trains[name] else base).read(name)

    digests = check_both(inputs)
    metadata = {
        "hft_merge": "half-reset",
        "hft_plan": plan.digest,
        "hft_policy": plan.policy.describe(),
        **{f"hft_{name}": digest for name, digest in digests.items()},
    }
    merge(inputs, pick, [Merged(record=(HALF_RESET_FILE, plan.to_json()), metadata=metadata)], announce)
    announce(
        f"half-reset: {sum(trains.values())} of {len(trains)} tensors have the tuned model's values and the others the "
        f"base's, by the plan in {inputs.output}/{HALF_RESET_FILE}"
    )
    announce(plan.describe())


def average_weights(inputs: MergeInputs, coefficient: float, announce: Announce) -> None:
    """Writes base + coefficient x (tuned - base) for every weight, computed in fp32 and rounded once.

    ``coefficient`` lies between 0 (the base's values) and 1 (the tuned model's), which give them bit for bit; weights
    that both models share keep their value at every coefficient. This is WiSE-FT's interpolation, arXiv 2109.01903.
    Raises UserError as ``half_reset`` does.
    """
    _average(inputs, {"": coefficient}, announce)
    count = len(units_of(inputs.shape))
    announce(f"average: the {count} tensors of {inputs.output} are base + {coefficient} x (tuned - base)")


def average_path(inputs: MergeInputs, coefficients: Sequence[float], announce: Announce) -> None:
    """Runs ``average_weights`` for several coefficients in one read, each into a folder of its name in the output.

    The folders appear together. A path of averages is what WiSE-FT compares (arXiv 2109.01903, figure 1). Names of
    coefficients must differ.
    """
    places = {place_of(coefficient): coefficient for coefficient in coefficients}
    assert len(places) == len(coefficients)
    _average(inputs, places, announce)
    announce(f"average: {inputs.output} has base + c x (tuned - base) for c in {', '.join(places)}, a folder for each")


def _average(inputs: MergeInputs, places: Mapping[str, float], announce: Announce) -> None:
    def average(name: str, tuned: HuggingFaceWeights, base: HuggingFaceWeights) -> Iterator[Tensor]:
        start, difference, last = None, None, [*places][-1]
        for place, coefficient in places.items():
            if coefficient in (0, 1):
                yield (tuned if coefficient else base).read(name)
                continue
            if start is None or difference is None:
                start = base.read(name).float()
                # Of a copy, because the tensor read is a map of the file, and changes in it would be read next time.
                difference = tuned.read(name).to(torch.float32, copy=True).sub_(start)
            if place != last:
                yield difference.mul(coefficient).add_(start)
                continue
            scaled = difference.mul_(coefficient).add_(start)
            start = difference = None  # while the last one is converted and written
            yield scaled

    digests, formula = check_both(inputs), "base + coefficient x (tuned - base)"
    outputs = [
        recorded(inputs, digests, AVERAGE, {"coefficient": coefficient, "rule": formula}, place)
        for place, coefficient in places.items()
    ]
    merge(inputs, average, outputs, announce)


def recorded(
    inputs: MergeInputs, digests: Mapping[str, str], name: str, rule: Mapping[str, Any], place: str = ""
) -> Merged:
    """A folder with ``NAME.json``: the rule, and the folders it was applied to with their ``digests``."""
    folders = {"tuned": inputs.tuned, "base": inputs.base}
    record = {**rule, **{key: {"folder": folder, "digest": digests[key]} for key, folder in folders.items()}}
    numbers = {f"hft_{key}": str(value) for key, value in rule.items() if isinstance(value, (int, float))}
    metadata = {"hft_merge": name, **numbers, **{f"hft_{key}": digest for key, digest in digests.items()}}
    return Merged(record=(f"{name}.json", json.dumps(record, indent=2) + "\n"), metadata=metadata, place=place)


def check_both(inputs: MergeInputs) -> dict[str, str]:
    """The digest of each folder by ``check_weights``, which may raise its errors."""
    digests = {}
    for name, folder in (("tuned", inputs.tuned), ("base", inputs.base)):
        digests[name] = check_weights(folder, inputs.shape, option=f"--{name}")
    return digests


def merge(inputs: MergeInputs, combine: Combine, outputs: Sequence[Merged], announce: Announce) -> None:
    """Writes whole folders, which appear together: the tensors that ``combine`` makes, for each of ``outputs``."""
    for note in (*inputs.notes, *notes_on_folder(inputs.tuned), *notes_on_folder(inputs.base)):
        announce(note)
    shapes = {f"{unit.name}.weight": whole_shape(unit.name, inputs.shape) for unit in units_of(inputs.shape)}
    with (
        HuggingFaceWeights(inputs.tuned, option="--tuned") as tuned,
        HuggingFaceWeights(inputs.base, option="--base") as base,
        _appears_whole(Path(inputs.output).resolve()) as folder,
    ):
        dtypes = {name: tuned.dtype(name) for name in shapes}
        announce_dtypes(dtypes, {name: base.dtype(name) for name in shapes}, "--base", announce)
        announced = [(name, dtypes[name], shapes[name]) for name in shapes]
        writers = []
        for output in outputs:
            (folder / output.place).mkdir(exist_ok=True)
            writers.append(ShardWriter(folder / output.place, announced, metadata=output.metadata))
        for name, dtype in dtypes.items():
            made = iter(combine(name, tuned, base))
            for writer in writers:  # without a name for the tensor, which would hold it while the next one is made
                writer.write(name, _converted(name, next(made), dtype))
        said: set[str] = set()
        for writer, output in zip(writers, outputs, strict=True):
            writer.close()
            said.update(keep_files(Path(inputs.tuned), writer.folder))
            file, text = output.record
            (writer.folder / file).write_text(text, encoding="utf-8")
        for line in sorted(said):  # of every folder the same
            announce(line)


def announce_dtypes(
    tuned: Mapping[str, torch.dtype], other: Mapping[str, torch.dtype], option: str, announce: Announce
) -> None:
    """A line where tensors of the folder that ``option`` names have other data types than those of --tuned."""
    differing = [name for name in tuned if tuned[name] != other[name]]
    if differing:
        first = differing[0]
        announce(
            f"{len(differing)} of {len(tuned)} tensors have another data type in {option} ({first}: {other[first]}) "
            f"than in --tuned ({tuned[first]}); the output uses that of --tuned, and values are rounded to it"
        )


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    smallest, largest = torch.aminmax(converted)  # isfinite would need two more tensors of the size
    if not math.isfinite(smallest) or not math.isfinite(largest):
        raise UserError(
            f"{name} has values that are not finite in {dtype}, its data type in --tuned; store the tuned model in "
            "the base's data type first."
        )
    return converted


@contextmanager
def _appears_whole(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``target`` at the end and is removed after an error."""
    destination = NewFolder(target=target)
    unfinished = destination.open()
    try:
        yield unfinished
        destination.publish(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
