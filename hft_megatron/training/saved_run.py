"""What a run's folder says about one of its checkpoints, read without the run's data, ranks or model."""

from dataclasses import dataclass, replace
from pathlib import Path

from hft_megatron.checkpoint.digests import combined_digest, digest_of
from hft_megatron.checkpoint.folders import checkpoint_at
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.checkpoint.store import PLAN_FILE, check_saved_plan
from hft_megatron.config import derived
from hft_megatron.config.loading import read_resolved
from hft_megatron.config.run_folder import RESOLVED_CONFIG_FILE, SPECTRUM_FILE
from hft_megatron.config.run_identity import RunIdentity
from hft_megatron.config.schema import RunConfig
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.load import check_weights
from hft_megatron.errors import UserError
from hft_megatron.hft.plan import Plan
from hft_megatron.hft.plan_file import load_plans
from hft_megatron.training.rounds import rounds_of_run
from hft_megatron.training.spectrum import read_scores


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """One checkpoint of a run, and the run around it."""

    folder: str
    """The run's --save."""
    checkpoint: Path
    config: RunConfig
    """The run's resolved options."""
    identity: RunIdentity
    state: TrainState

    @staticmethod
    def read(folder: str, iteration: int | None) -> "SavedRun":
        """Reads ``folder``, the newest checkpoint where ``iteration`` is None; UserError for what is missing."""
        checkpoint = checkpoint_at(folder, iteration)
        identity = RunIdentity.read("--load", folder)
        return SavedRun(
            folder=folder,
            checkpoint=checkpoint,
            config=read_resolved(Path(folder) / RESOLVED_CONFIG_FILE),
            identity=identity,
            state=TrainState.read(checkpoint),
        )

    def source(self) -> str | None:
        """The Hugging Face folder that the run started from; None where there was none or it is gone.

        UserError when the folder holds other weights by now, or when it is gone and the checkpoint lacks those that
        rested (--save-trained-only).
        """
        folder = self.config.model.load_hf
        on_source = not self.state.is_whole and self.state.base_iteration is None
        if folder is None or not Path(folder).is_dir():
            if on_source:
                raise UserError(
                    f"--load {self.folder}: {self.checkpoint.name} holds only what its round trained, and --load-hf "
                    f"{folder}, where the rest is, is not there; put it back, or choose another --iteration."
                )
            return None
        is_same = check_weights(folder, self.identity.shape) == self.identity.weights_digest
        if is_same and on_source:
            with HuggingFaceWeights(folder) as weights:
                files = {path.name: digest_of(path) for path in weights.files()}
            is_same = combined_digest(files) == self.state.base_digest
        if not is_same:
            raise UserError(
                f"--load {self.folder}: its run started from --load-hf {folder}, which holds other weights now; put "
                "the old ones back, or rename that folder to convert without it."
            )
        return folder

    def trained(self) -> frozenset[str]:
        """Units that the run may have changed until this checkpoint.

        UserError when the options (a plan file, scores) don't give the checkpoint's own plan any more.
        """
        shape = self.identity.shape
        file = self.checkpoint / PLAN_FILE
        if self.state.round == 0:
            return Plan.from_json(file.read_text(encoding="utf-8"), shape=shape, source=str(file)).training
        hft = self.config.hft
        rounds = rounds_of_run(
            # Without iterations, as in any conversion: lengths of rounds, which epochs may decide, are not looked at.
            replace(self.config, training=replace(self.config.training, train_iters=0)),
            shape,
            world_size=1,
            samples=None,
            loaded=() if hft.hft_plan is None else load_plans(hft.hft_plan, shape),
            scores=read_scores(Path(self.folder) / SPECTRUM_FILE, shape) if hft.hft_selection == "spectrum" else None,
        )
        trained = rounds.trained_until(self.state.round)
        check_saved_plan(self.checkpoint, rounds.plan(self.state.round), shape)
        return trained

    def tokenizer_path(self) -> str | None:
        """Where the run's tokenizer was read from; None where nothing is there any more."""
        path = derived.tokenizer_path(self.config)
        return path if Path(path).exists() else None
