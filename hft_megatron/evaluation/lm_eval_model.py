"""A model with lm-evaluation-harness's interface: texts in, log-probabilities and texts out.

Texts are processed before and after the model as by the harness's ``hf`` model, so that a task has the same result: the
special tokens before a text, the cut of a long one, and the end of a generated one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hft_megatron.data.tokenizer import Encoded
from hft_megatron.errors import UserError
from hft_megatron.evaluation.answers import Questions
from hft_megatron.evaluation.examples import Answer, Generated, SequenceScore
from hft_megatron.evaluation.generation import GenerationRules

_NEW_TOKENS = 256
"""Maximum of ``hf`` for generated tokens where a task doesn't set one."""
_TOP_K = 50
"""Number of tokens among which transformers draws where a task doesn't set it."""


class WithSpecialTokens:
    """Decodes ids with the names of special tokens, by which tasks may end a text."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""
        text: str = self._encoder.decode(ids, skip_special_tokens=False)
        return text


class HarnessModel(TemplateLM):
    """Answers the harness's requests; on rank 0."""

    backend = "causal"

    def __init__(
        self,
        encoder: Any,
        *,
        window: int,
        end_ids: Sequence[int],
        ask: Callable[..., list[Answer]],
        say: Callable[[str], None],
    ) -> None:
        """``encoder`` is transformers' tokenizer, ``end_ids`` end a generation, and ``ask`` is ``Service.ask``."""
        super().__init__()
        self.tokenizer = encoder
        self.max_length = window
        self._end_ids = tuple(end_ids)
        self._ask = ask
        self._say = say

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's caches, which are not used."""
        return type(self.tokenizer).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, with the begin token where the tokenizer puts one and the text doesn't have it yet."""
        if add_special_tokens is None:
            return self._encode(string, self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _encode(self, text: str, begin: str | None) -> list[int]:
        if begin is not None and text.startswith(begin):
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        return list(self.tokenizer.encode(text))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Nats of each continuation, and whether greedy generation would choose it."""
        scores = self._score([(context, continuation) for _, context, continuation in requests])
        return [(score.log_prob, score.is_greedy) for score in scores]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[SequenceScore]:
        sequences: list[Encoded] = []
        cut = 0
        for context, continuation in pairs:
            if not 1 <= len(continuation) <= self.max_length:
                raise UserError(
                    f"A task of lm-evaluation-harness asks for a continuation of {len(continuation)} tokens, but it "
                    f"must have 1 to {self.max_length}, the model's context; leave the task out."
                )
            # The last token is not read, so one more token than the context may be asked for.
            ids = (context + continuation)[-(self.max_length + 1) :]
            cut += len(context) + len(continuation) > len(ids)
            sequences.append((np.array(ids, dtype=np.int32), np.arange(len(ids)) >= len(ids) - len(continuation)))
        self._tell_cut(cut, len(pairs))
        answers = self._ask(Questions(sequences=sequences), name="lm-evaluation-harness: log-probabilities")
        assert all(isinstance(answer, SequenceScore) for answer in answers)
        return answers  # type: ignore[return-value]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text, each token once, in windows of the model's context."""
        windows, counts = [], []
        for request in requests:
            of_text = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            new = [make_disjoint_window(window) for window in of_text]
            windows += new
            counts.append(len(new))
        scores = iter(self._score(windows))
        return [sum(next(scores).log_prob for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, without the text that ended it."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for numbers in alike.values():
            wanted = dict(requests[numbers[0]].args[1])
            continued = self._continue([requests[number].args[0] for number in numbers], wanted)
            for number, text in zip(numbers, continued, strict=True):
                texts[number] = text
        return texts

    def _continue(self, contexts: Sequence[str], wanted: Mapping[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(wanted), _NEW_TOKENS))
        ends = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = [stop for stop in handle_stop_sequences(options.pop("until"), eos=ends) if stop]
        rules = _rules(options, tuple(until), self._end_ids)
        room = self.max_length - rules.max_new_tokens
        if room < 1:
            raise UserError(
                f"A task of lm-evaluation-harness generates up to {rules.max_new_tokens} tokens (max_gen_toks), but "
                f"the model's context of {self.max_length} must hold its prompt as well; leave the task out."
            )
        encoded = [self._encode(context, self.tokenizer.bos_token) for context in contexts]
        if not all(encoded):
            raise UserError("A task of lm-evaluation-harness has a prompt without a token; leave the task out.")
        self._tell_cut(sum(len(ids) > room for ids in encoded), len(encoded))
        prompts = [np.array(ids[-room:], dtype=np.int32) for ids in encoded]
        answers = self._ask(Questions(prompts=prompts, rules=rules), name="lm-evaluation-harness: texts")
        return [self._text(answer, until) for answer in answers]

    def _text(self, answer: Answer, until: list[str]) -> str:
        assert isinstance(answer, Generated)
        whole = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
        text: str = postprocess_generated_text(whole, stop=until, think_end_token=None)
        return text

    def _tell_cut(self, cut: int, of: int) -> None:
        if cut:
            self._say(
                f"> lm-evaluation-harness: {cut} of {of} texts are longer than the model's context of "
                f"{self.max_length} tokens allows, and their beginnings are cut off"
            )


def _rules(options: Mapping[str, Any], until: tuple[str, ...], end_ids: tuple[int, ...]) -> GenerationRules:
    """The rules of a task's ``generation_kwargs``, normalised. Raises UserError for unsupported ones."""
    known = {"do_sample", "temperature", "top_k", "top_p", "max_gen_toks"}
    for name, value in options.items():
        if name not in known and not (name == "num_beams" and value == 1):
            raise UserError(
                f"A task of lm-evaluation-harness sets {name} to {value} in generation_kwargs, which is not supported; "
                f"supported are until, {', '.join(sorted(known))}."
            )
    if not options["do_sample"]:
        return GenerationRules(max_new_tokens=options["max_gen_toks"], stop=until, end_ids=end_ids)
    return GenerationRules(
        max_new_tokens=options["max_gen_toks"],
        temperature=float(options.get("temperature") or 1.0),
        top_k=int(options.get("top_k", _TOP_K)),
        top_p=float(options.get("top_p", 1.0)),
        stop=until,
        end_ids=end_ids,
    )
