"""The methods that a run can have, by the name of their command."""

from hft_megatron.config.names import MethodName
from hft_megatron.methods.dpo.data import read_preference_data
from hft_megatron.methods.dpo.objective import preference_objective
from hft_megatron.methods.dpo.reference_of_run import reference_of_run
from hft_megatron.methods.next_token import NEXT_TOKEN
from hft_megatron.methods.pretrain.data import read_corpus_data
from hft_megatron.methods.sft.data import read_sft_data
from hft_megatron.trainer.method import Method

METHODS: dict[MethodName, Method] = {
    "sft": Method(name="sft", objective=lambda config: NEXT_TOKEN, read_data=read_sft_data),
    "dpo": Method(
        name="dpo",
        objective=lambda config: preference_objective(config.dpo),
        read_data=read_preference_data,
        reference=reference_of_run,
    ),
    "pretrain": Method(name="pretrain", objective=lambda config: NEXT_TOKEN, read_data=read_corpus_data),
}
