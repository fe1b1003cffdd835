"""One checkpoint of a run, with the run's files around it."""

from dataclasses import dataclass
from pathlib import Path

from hft_megatron.checkpoint.folders import checkpoint_at, combined_digest, digest_of, end_of_chain
from hft_megatron.checkpoint.position import TrainState
from hft_megatron.config import derived
from hft_megatron.config.loading import read_resolved
from hft_megatron.config.run import RunConfig
from hft_megatron.config.run_folder import RESOLVED_CONFIG_FILE
from hft_megatron.config.run_identity import RunIdentity
from hft_megatron.conversion.hf_folder import HuggingFaceWeights
from hft_megatron.conversion.load import check_weights
from hft_megatron.data.templates import BUILT_IN
from hft_megatron.data.tokenizer import Tokenizer, fit_tokenizer
from hft_megatron.data.tokenizer_loading import holds_tokenizer, load_tokenizer
from hft_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """One checkpoint of a run, and the run around it."""

    option: str
    """Option that names the folder on the command line, for errors."""
    folder: str
    """The run's --save folder."""
    checkpoint: Path
    config: RunConfig
    """The run's resolved options."""
    identity: RunIdentity
    state: TrainState

    @staticmethod
    def read(folder: str, iteration: int | None, *, option: str = "--load") -> "SavedRun":
        """Reads ``folder``, at the newest checkpoint where ``iteration`` is None; UserError for missing files."""
        checkpoint = checkpoint_at(folder, iteration, option=option)
        identity = RunIdentity.read(option, folder)
        return SavedRun(
            option=option,
            folder=folder,
            checkpoint=checkpoint,
            config=read_resolved(Path(folder) / RESOLVED_CONFIG_FILE),
            identity=identity,
            state=TrainState.read(checkpoint, option=option),
        )

    def source(self) -> str | None:
        """The Hugging Face folder that the run started from; None where there was none or it is gone.

        UserError when the folder now holds other weights, or when it is gone and the checkpoint lacks the frozen ones
        (--save-trained-only).
        """
        folder = self.config.model.load_hf
        end = end_of_chain(self.checkpoint, option=self.option)
        if folder is None or not Path(folder).is_dir():
            if end.is_based_on_model:
                raise UserError(
                    f"{self.option} {self.folder}: {self.checkpoint.name} holds only the weights trained in its round, "
                    f"but --load-hf {folder}, which has the others, does not exist; put it back, or choose another "
                    f"iteration."
                )
            return None
        is_same = check_weights(folder, self.identity.shape) == self.identity.weights_digest
        if is_same and end.is_based_on_model:
            with HuggingFaceWeights(folder) as weights:
                files = {path.name: digest_of(path) for path in weights.files()}
            is_same = combined_digest(files) == end.base_digest
        if not is_same:
            raise UserError(
                f"{self.option} {self.folder}: its run started from --load-hf {folder}, which now holds other weights; "
                "put the old ones back, or rename that folder to convert without it."
            )
        return folder

    def tokenizer(self) -> Tokenizer | None:
        """The run's tokenizer with its chat template, from its original path; None where it is gone."""
        path = derived.tokenizer_path(self.config)
        if not Path(path).exists() or not holds_tokenizer(path):
            return None
        tokenizer = load_tokenizer(self.config.data.tokenizer_type, path, self.chat_template())
        return fit_tokenizer(tokenizer, self.identity.shape.vocab_size)

    def chat_template(self) -> str | None:
        """The run's --chat-template; UserError where it is a file that is gone."""
        template = self.config.data.chat_template
        if template is not None and template not in BUILT_IN and not Path(template).is_file():
            raise UserError(
                f"{self.option} {self.folder}: its run was trained with --chat-template {template}, which does not "
                f"exist; put the file back, so that the same template is used."
            )
        return template
