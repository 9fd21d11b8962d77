"""Stable import path of sampling and log-probs; the code is in `hmpo`."""

from hmpo.logprobs.responses import token_logprobs as compute_log_probs_batch
from hmpo.sampling.responses import sample_responses as sample_responses_batch

__all__ = ["compute_log_probs_batch", "sample_responses_batch"]
