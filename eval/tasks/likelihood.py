"""Tasks that ask how likely a text goes on as given; lmms-eval lets chat models generate only."""

from __future__ import annotations

from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableMessagesTask


class LikelihoodTask(ConfigurableMessagesTask):
    """A text in ``doc_to_text``, without a chat template, and its continuation in ``doc_to_target``.

    For a YAML file's ``class``, with ``output_type: loglikelihood``. The model's ``loglikelihood`` gets ``(text,
    continuation, doc_id, task, split)``; ``process_results`` gets its log-likelihood in nats, and whether greedy
    decoding says the same.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def construct_requests(self, doc_id: int, ctx: str, **options: Any) -> Instance:
        """The request of one document."""
        split = options["metadata"]["split"]
        continuation = self.doc_to_target(self.dataset[split][doc_id])
        arguments = (ctx, continuation, doc_id, self.config.task, split)
        return Instance(request_type="loglikelihood", arguments=arguments, idx=0, **options)

    def process_results(self, doc: dict[str, Any], results: list[Any], **options: Any) -> dict[str, float]:
        """The metrics of one document; lmms-eval 0.7 hands on as text what a model returned."""
        return super().process_results(doc, [_pair(told) for told in results], **options)


def _pair(told: str | tuple[float, bool]) -> tuple[float, bool]:
    """``"(-1.5, True)"`` as what it was."""
    if isinstance(told, str):
        likelihood, same = told.strip("()").split(", ")
        return float(likelihood), same == "True"
    return told
