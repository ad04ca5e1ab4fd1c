"""Documents of a spliced sample, kept apart: computed by hand here, in complete runs in test_loss.py."""

import datasets
import pyarrow
import pytest
import torch
from transformers import LlamaForCausalLM, modeling_flash_attention_utils
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.read.batch import Collator
from colossal_llama2.dataset.read.prepared_data import check_lengths, load_tokenized_dataset
from colossal_llama2.engine.patches import cpu_device, document_attention
from colossal_llama2.errors import UserError
from colossal_llama2.model.documents import MaskForm, attention_inputs, block_mask, borders, position_ids

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])


def test_positions_restart_at_each_document():
    assert position_ids(DOCUMENTS).tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], list(range(8))]


def test_flash_attn_gets_borders_for_rows_of_one_document_too():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    inputs = attention_inputs(mask, None, form=MaskForm.BORDERS, dtype=torch.float32, device=CPU, shape=(2, 4))
    assert inputs["attention_mask"] is None and inputs["cu_seq_lens_q"].tolist() == [0, 3, 4, 8]
    assert inputs["max_length_q"] == 4 and inputs["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]

    inputs = attention_inputs(None, None, form=MaskForm.BORDERS, dtype=torch.float32, device=CPU, shape=(2, 4))
    assert inputs["cu_seq_lens_q"].tolist() == [0, 4, 8] and inputs["max_length_k"] == 4
    assert "position_ids" not in inputs and inputs["attention_mask"] is None


def test_a_token_sees_its_document_up_to_itself_and_no_row_is_hidden():
    sees = block_mask(DOCUMENTS, torch.float32)[0, 0] == 0
    expected = [[1], [1, 1], [1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1, 1]]
    assert [row.int().tolist()[: place + 1] for place, row in enumerate(sees)][:5] == expected
    assert not sees.triu(1).any() and sees.diagonal().all()


def test_borders_are_those_that_transformers_finds():
    query = torch.zeros(2, 8, 1, 1)
    # Older and newer name.
    found_in = getattr(modeling_flash_attention_utils, "prepare_fa2_from_position_ids", None)
    found_in = found_in or modeling_flash_attention_utils._prepare_from_posids
    *_, (cumulative, _), (longest, _) = found_in(query, query, query, position_ids(DOCUMENTS))
    ours = borders(DOCUMENTS)
    assert torch.equal(ours[0], cumulative) and ours[0].dtype == cumulative.dtype and ours[1] == int(longest)
    inputs = attention_inputs(
        None, DOCUMENTS, form=MaskForm.BORDERS, dtype=torch.float32, device=CPU, shape=DOCUMENTS.shape
    )
    assert inputs.keys() - {"attention_mask", "position_ids"} == FlashAttentionKwargs.__annotations__.keys()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_spliced_sample_has_the_logits_of_its_documents(model_dir, attention):
    model = LlamaForCausalLM.from_pretrained(model_dir, attn_implementation=attention)
    ids = torch.arange(20, 36).view(2, 8)
    inputs = attention_inputs(
        None, DOCUMENTS, form=MaskForm.BLOCKS, dtype=model.dtype, device=model.device, shape=DOCUMENTS.shape
    )
    with torch.no_grad():
        spliced = model(ids, **inputs).logits
        alone = [model(part).logits for part in (ids[:1, :3], ids[:1, 3:5], ids[1:])]
    for logits, part in zip(alone, (spliced[:1, :3], spliced[:1, 3:5], spliced[1:]), strict=True):
        assert torch.allclose(logits, part, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("with_colossalai")
def test_colossalai_attention_supports_documents():
    from colossalai.shardformer.layer.attn import ColoAttention

    cpu_device.install()
    before = ColoAttention.prepare_attn_kwargs
    for use_flash_attn in (False, True):
        document_attention.install(use_flash_attn=use_flash_attn)
    installed = ColoAttention.prepare_attn_kwargs
    assert installed.__wrapped__ is getattr(before, "__wrapped__", before)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 8, 4) for _ in range(3))
    shape = (2, 1, 8, 8)
    out = ColoAttention.attention(
        q, k, v, **installed(shape, q.dtype, q.device, q_padding_mask=DOCUMENTS, is_causal=True, invert=True)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=block_mask(DOCUMENTS, q.dtype))
    assert torch.allclose(out, expected, atol=1e-6)
    padding = (DOCUMENTS > 0).long()
    ours, theirs = (
        prepare(shape, q.dtype, q.device, q_padding_mask=padding, is_causal=True) for prepare in (installed, before)
    )
    assert ours.keys() == theirs.keys() and torch.equal(ours["attention_mask"], theirs["attention_mask"])


def table(rows):
    kind = pyarrow.list_(pyarrow.int32())
    names = ("input_ids", "labels", "sequence_lengths")
    return pyarrow.table({name: pyarrow.array([row[i] for row in rows], kind) for i, name in enumerate(names)})


def test_collator_numbers_documents_and_predicts_none_from_another():
    collate = Collator(pad_token_id=2, max_length=16)
    ids = [1, 5, 2, 1, 7, 8, 2]
    batch = collate(table([(ids, [-100, *ids[1:]], [3, 4]), ([1, 9, 2], [1, 9, 2], [3])]))
    assert batch.documents.tolist() == [[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert batch.labels[0].tolist() == [-100, 5, 2, IGNORE_INDEX, 7, 8, 2, -100]
    assert batch.predicted == 2 + 3 + 2
    # With one document per row, the causal mask is enough.
    assert collate(table([(ids, ids, [7])])).documents is None
    # Without the column, as in the original, the first token of a document is predicted too.
    batch = collate(table([(ids, ids, [3, 4])]).drop_columns("sequence_lengths"))
    assert batch.documents is None and batch.predicted == 6


def save(folder, **columns):
    datasets.Dataset.from_dict(columns).save_to_disk(folder)
    return str(folder)


def test_data_without_borders(tmp_path, caplog):
    ids = [[1, 5, 2, 1, 6, 2]]
    plain = save(tmp_path / "part-00000", input_ids=ids, labels=ids)
    spliced = save(tmp_path / "part-00001", input_ids=ids, labels=ids, sequence_lengths=[[3, 3]])
    assert "sequence_lengths" in load_tokenized_dataset([spliced], "auto").column_names
    for paths, mode in (([spliced], "off"), ([plain], "auto"), ([spliced, plain], "auto")):
        assert "sequence_lengths" not in load_tokenized_dataset(paths, mode).column_names
    assert "part-00000 has no column sequence_lengths" in caplog.text and len(caplog.records) == 1
    with pytest.raises(UserError, match="--document_mask on: .*part-00000 has no column"):
        load_tokenized_dataset([spliced, plain], "on")


@pytest.mark.parametrize("lengths", [[3, 2], [], [6, 0], [7, -1]])
def test_borders_that_do_not_fit_are_refused(tmp_path, lengths):
    ids = [1, 5, 2, 1, 6, 2]
    path = save(tmp_path / "part-00000", input_ids=[[1, 2], ids], labels=[[1, 2], ids], sequence_lengths=[[2], lengths])
    with pytest.raises(UserError, match="sequence_lengths"):
        check_lengths(load_tokenized_dataset([path], "on"), max_length=16)
