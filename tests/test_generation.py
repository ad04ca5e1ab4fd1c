"""The loop of generation against `generate` of transformers: the same ids, alone and together, greedy and drawn."""

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from colossal_llama2.errors import RunError
from colossal_llama2.inference.answer import Answer
from colossal_llama2.inference.generation import generate_tokens
from colossal_llama2.inference.loading import load_model
from colossal_llama2.inference.prompt_batch import KeptStates
from colossal_llama2.inference.settings import GenerationSettings
from tests import tiny
from tests.byte_level import make_byte_level
from tests.test_byte_level_run import make_model

PROMPTS = ("the", "A list of names follows; each one of them is bound to a value", "", tiny.CHINESE, "if x < 3:")
DRAWN = {"do_sample": True, "temperature": 1.4, "top_k": 40, "top_p": 0.9, "seed": 5}
GREEDY = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "seed": None}


@pytest.fixture(scope="module", params=["sentencepiece", "llama3"])
def loaded(request, tmp_path_factory, model_dir):
    """A model with more rows than tokens and several end tokens, and one with scaled positions and fewer key heads."""
    if request.param == "sentencepiece":
        return load_model(str(model_dir), "cpu")
    folder = make_byte_level(tmp_path_factory.mktemp("llama3") / "model", "llama3")
    return load_model(str(make_model(folder)), "cpu")


def ids_of(tokenizer, prompt: str) -> list[int]:
    return tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]


def continued(model, tokenizer, rows, settings: GenerationSettings, **options) -> list[list[int]]:
    """The new ids of each row."""
    found: list[list[int]] = [[] for _ in rows]
    for step in generate_tokens(model, tokenizer, rows, settings, **options):
        for row, token in step.items():
            found[row].append(token)
    return found


def by_transformers(model, tokenizer, row, **settings) -> list[int]:
    """The same from `generate`, without the end of the text."""
    config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, pad_token_id=0, **settings)
    before, model.generation_config = model.generation_config, config
    ids = torch.tensor([row])
    try:
        new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(row) :].tolist()
    finally:
        model.generation_config = before
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return new[:-1] if new and new[-1] in ends else new


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_ids_are_those_of_transformers(loaded, prompt, penalty):
    row = ids_of(loaded[1], prompt)
    ours = continued(*loaded, [row], GenerationSettings(24, repetition_penalty=penalty, **GREEDY))
    assert ours == [by_transformers(*loaded, row, max_new_tokens=24, do_sample=False, repetition_penalty=penalty)]


@pytest.mark.parametrize(
    "change", [{}, {"top_k": 100_000}, {"top_p": 1.0}, {"top_k": 1}, {"top_p": 0.01}, {"repetition_penalty": 1.5}]
)
def test_a_seed_draws_what_transformers_draws(loaded, change):
    model, tokenizer = loaded
    row = ids_of(tokenizer, "the")
    flags = {"repetition_penalty": 1.0, **DRAWN, **change}
    for seed in (1, 2):
        torch.manual_seed(seed)
        others = {name: value for name, value in flags.items() if name != "seed"}
        expected = by_transformers(model, tokenizer, row, max_new_tokens=24, **others)
        torch.manual_seed(1000)
        assert continued(model, tokenizer, [row], GenerationSettings(24, **{**flags, "seed": seed})) == [expected]
    if change.get("top_k") == 1 or change.get("top_p") == 0.01:
        assert continued(model, tokenizer, [row], GenerationSettings(24, **GREEDY)) == [expected]


def test_without_a_seed_the_global_generator_draws(loaded):
    row = ids_of(loaded[1], "the")
    settings = GenerationSettings(12, **(DRAWN | {"seed": None, "temperature": 3.0}))
    torch.manual_seed(1)
    first = continued(*loaded, [row], settings)
    assert continued(*loaded, [row], settings) != first
    torch.manual_seed(1)
    assert continued(*loaded, [row], settings) == first


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_together_is_one_by_one(loaded, penalty):
    """Prompts of different lengths, some of which end early and leave the batch."""
    model, tokenizer = loaded
    rows = [ids_of(tokenizer, prompt) for prompt in PROMPTS]
    settings = GenerationSettings(24, repetition_penalty=penalty, **GREEDY)
    alone = [continued(model, tokenizer, [row], settings)[0] for row in rows]
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [alone[0][3], alone[2][7]]
    try:
        alone = [continued(model, tokenizer, [row], settings)[0] for row in rows]
        assert len(set(map(len, alone))) > 1
        assert continued(model, tokenizer, rows, settings) == alone
    finally:
        model.generation_config.eos_token_id = ends


def test_what_a_row_draws_does_not_depend_on_the_others(loaded):
    rows = [ids_of(loaded[1], prompt) for prompt in PROMPTS]
    settings = GenerationSettings(12, **DRAWN)
    together = continued(*loaded, rows, settings, numbers=range(10, 15))
    for number, row in enumerate(rows):
        alone = continued(*loaded, [row], settings, numbers=[10 + number])
        seeded = continued(*loaded, [row], GenerationSettings(12, **(DRAWN | {"seed": 15 + number})))
        assert together[number] == alone[0] == seeded[0]
    same = continued(*loaded, [rows[0]] * 3, settings)
    assert len({tuple(row) for row in same}) == 3


def test_each_row_ends_with_its_own_context(loaded, monkeypatch):
    model, tokenizer = loaded
    rows = [ids_of(tokenizer, "the the the the the"), ids_of(tokenizer, "the")]
    monkeypatch.setattr(model.config, "rope_scaling", None)
    monkeypatch.setattr(model.config, "max_position_embeddings", len(rows[0]) + 3)
    found = continued(model, tokenizer, rows, GenerationSettings(50, **GREEDY))
    assert [len(row) + len(new) for row, new in zip(rows, found, strict=True)] == [len(rows[0]) + 3] * 2


def test_rows_without_a_token_are_never_chosen(tmp_path, tokenizer_dir):
    folder = tiny.make_model(tmp_path / "m", tokenizer_dir)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(640)
    with torch.no_grad():
        # After any token, these rows are the most likely ones.
        model.lm_head.weight[600:] = 10 * model.lm_head.weight[:40]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for flags in (GREEDY, DRAWN, DRAWN | {"top_k": 630}):
        (new,) = continued(model, tokenizer, [ids_of(tokenizer, "the")], GenerationSettings(20, **flags))
        assert new and max(new) < 600


@pytest.mark.parametrize("stop", [None, 5])
def test_kept_states_change_nothing(loaded, stop):
    """Prompts that go on, change in the middle, begin anew and are repeated; also where an answer was stopped."""
    model, tokenizer = loaded
    settings = GenerationSettings(9, **GREEDY)
    kept = KeptStates()
    row = ids_of(tokenizer, PROMPTS[1])
    prompts = [row, row[:7] + [9, 10, 11], row + [40, 41], [50, 51], row + [40, 41], row + [40, 41]]
    for prompt in prompts:
        expected = continued(model, tokenizer, [prompt], settings)[0]
        steps = generate_tokens(model, tokenizer, [prompt], settings, kept=kept)
        found = [step[0] for step, _ in zip(steps, range(stop or 100), strict=False)]
        assert found == expected[: stop or 100]
        assert kept.ids == [*prompt, *expected][: len(kept.ids)] and len(kept.ids) >= len(prompt) + len(found) - 1
        assert kept.cache.get_seq_length() == len(kept.ids)
        prompts.append([*prompt, *found, 20, 21]) if len(prompts) < 9 else None


def test_an_interrupted_pass_keeps_no_states(loaded, monkeypatch):
    model, tokenizer = loaded
    kept = KeptStates()
    row = ids_of(tokenizer, "the")
    list(generate_tokens(model, tokenizer, [row], GenerationSettings(3, **GREEDY), kept=kept))
    layer, before = model.model.layers[1], type(model.model.layers[1]).forward

    def interrupted(*args, **keys):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(generate_tokens(model, tokenizer, [[*row, 7]], GenerationSettings(3, **GREEDY), kept=kept))
    monkeypatch.setattr(layer, "forward", before.__get__(layer))
    assert kept.cache is None and kept.ids == []
    settings = GenerationSettings(6, **GREEDY)
    found = continued(model, tokenizer, [[*row, 7]], settings, kept=kept)
    assert found == continued(model, tokenizer, [[*row, 7]], settings)


def test_an_answer_counts_its_tokens_and_reports_where_it_was_cut(loaded):
    model, tokenizer = loaded
    row = ids_of(tokenizer, "the")
    (new,) = continued(model, tokenizer, [row], GenerationSettings(8, **GREEDY))
    answer = Answer(model, tokenizer, row, GenerationSettings(8, **GREEDY))
    assert "".join(answer) == answer.text and answer.tokens == len(new) and answer.is_cut == (len(new) == 8)
    assert answer.seconds > 0 and answer.speed().startswith(f"{len(new)} tokens, ")
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = new[4]
    try:
        answer = Answer(model, tokenizer, row, GenerationSettings(8, **GREEDY))
        list(answer)
        assert answer.tokens == new.index(new[4]) and not answer.is_cut
    finally:
        model.generation_config.eos_token_id = ends


@pytest.mark.parametrize("flags", [GREEDY, DRAWN])
def test_a_model_that_computes_nan_is_one_line(loaded, monkeypatch, flags):
    model, tokenizer = loaded
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: forward(hidden) * torch.inf)
    with pytest.raises(RunError, match="NaN or Inf in float32; use --dtype fp32"):
        continued(model, tokenizer, [ids_of(tokenizer, "the")], GenerationSettings(4, **flags))
