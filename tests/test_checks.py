"""What is wrong between the flags, the model and the data of a run."""

import pytest

from colossal_llama2.errors import UserError
from colossal_llama2.model.loading import inspect_weights
from colossal_llama2.train.checks import check_highest_id


def test_token_ids_beyond_the_vocabulary_are_refused(model_dir):
    facts = inspect_weights(str(model_dir))
    check_highest_id(599, facts)
    with pytest.raises(UserError, match="--dataset has token id 600, the model's vocabulary ends at 599"):
        check_highest_id(600, facts)
