"""Evaluation while training, with the real ColossalAI, against plain transformers on each document separately."""

import json
import math
import shutil
from itertools import accumulate, pairwise
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from colossal_llama2.dataset.write.prepare import prepare_pretrain, prepare_sft
from colossal_llama2.evaluation import text_task
from colossal_llama2.evaluation.compute import records_of
from colossal_llama2.evaluation.results import result_of
from colossal_llama2.evaluation.tasks import read_tasks
from colossal_llama2.evaluation.text_task import TextTask
from colossal_llama2.inference.generation import generate, generate_tokens
from colossal_llama2.inference.loading import load_model
from colossal_llama2.inference.prompt_file import read_prompts
from colossal_llama2.inference.prompts import PROMPT_SUFFIX, chat_ids
from colossal_llama2.inference.settings import GenerationSettings
from colossal_llama2.inference.streaming import TextStream
from colossal_llama2.markdown import plain
from colossal_llama2.train.report import reporter, train_log
from tests import bits_per_byte, evaluation_files, fork_server, layouts, preparing, tiny
from tests.launching import launch
from tests.training_jobs import Job, finished, weights_of

LENGTH, CHAT_LENGTH = 64, 192
# Prompts of tasks are longer than the samples.
PROMPT_LENGTH = 256
FLOAT32_RUNS = {
    "ddp": layouts.flags("fp32 ddp"),
    "zero2": layouts.flags("fp32 zero2"),
    "zero2_all_logits": layouts.flags("fp32 zero2", "--chunked_loss", "off", "--use_flash_attn"),
    "zero2_cpu": layouts.flags("fp32 zero2_cpu", "--micro_batch_size", "3"),
    "3d": layouts.flags("fp32 3d"),
    "3d_tp2": layouts.flags("fp32 3d tp2 flash"),
    "3d_pp2": layouts.flags("fp32 3d pp2", "--microbatch_size", "2"),
    "3d_sp2": layouts.flags("fp32 3d sp2 all_to_all"),
    "one_rank": layouts.flags("fp32 zero2"),
}
BFLOAT16_RUNS = {
    "zero2_bf16": layouts.flags("bf16 zero2"),
    "gemini": layouts.flags("bf16 gemini"),
    "gemini_auto": layouts.flags("bf16 gemini_auto"),
    "3d_tp2_bf16": layouts.flags("bf16 3d tp2 zero1"),
    "3d_pp2_bf16": layouts.flags("bf16 3d pp2 zero1", "--microbatch_size", "2"),
}
UNMEASURED = ("zero2", "gemini", "gemini_auto", "3d_pp2_bf16")
ANSWER_TOKENS = 5
# Items of each task, and examples before a question. 21 leave rows over in the last micro batch, which do not count.
ITEMS, SHOTS = 21, 1
GREEDY = GenerationSettings(max_new_tokens=ANSWER_TOKENS, do_sample=False, temperature=1, top_k=1, top_p=1, seed=None)
# The evaluation that a signal interrupts in each run: the one after step 4, and the one after the last step, 7.
CUT = {"cut_at_4": (1, "3d_pp2_bf16"), "cut_at_the_end": (2, "zero2")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_dir) -> Path:
    """A prepared folder of real text with a held-out part; its samples contain several documents."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = [
        {"target": text[:150], **({"source": "Documentation: "} if number % 4 == 0 else {})}
        for number, text in enumerate(tiny.english_documents()[:90])
    ]
    preparing.write_lines(folder / "en" / "text.jsonl", rows)
    prepare_pretrain(
        **preparing.settings([folder / "en"], tokenizer_dir, folder, max_length=LENGTH, bins=2, eval_fraction=0.3)
    )
    cut = [{"target": tiny.CHINESE[: 2 + number % 9] + row["target"]} for number, row in enumerate(rows[:30])]
    preparing.write_lines(folder / "zh" / "text.jsonl", cut)
    keywords = preparing.settings([folder / "zh"], tokenizer_dir, folder / "cut", max_length=48, eval_fraction=0.5)
    prepare_pretrain(**keywords, overlong="truncate")
    return folder / "arrow"


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tokenizer_dir) -> Path:
    """A bin of five conversations, the last of which has two questions."""
    folder = tmp_path_factory.mktemp("chats")
    pairs = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in "abcd"]
    rows = [{"messages": turns} for turns in [*pairs, pairs[0] + pairs[1]]]
    preparing.write_lines(folder / "in" / "rows.jsonl", rows)
    prepare_sft(**preparing.settings([folder / "in"], tokenizer_dir, folder, max_length=CHAT_LENGTH))
    return folder / "arrow" / "part-00000"


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory) -> Path:
    """The files of a set, with 30 questions."""
    return evaluation_files.write_mmlu(tmp_path_factory.mktemp("mmlu"), questions=15)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, prepared, model_dir, chats, mmlu) -> dict[str, Job]:
    """Every run of this file, by name."""
    folder = tmp_path_factory.mktemp("jobs")
    specs = {}
    # One document per row and no byte counts, like data from elsewhere.
    plain = folder / "plain_samples"
    datasets.load_from_disk(prepared / "eval").select_columns(["input_ids", "labels"]).save_to_disk(plain)

    def add(name: str, *flags, home=None, **more) -> None:
        here = folder / (home or name)
        common = ["--pretrained", model_dir, "--dataset", prepared, "--max_length", PROMPT_LENGTH, "--lr", "1e-3"]
        common += ["--save_dir", here / "ckpt", "--tensorboard_dir", here / "tb", "--config_file", here / "config.json"]
        common += ["--micro_batch_size", "4", "--save_interval", "4"]
        words = [str(word) for word in [*common, *flags]]
        specs[name] = {"name": name, "script": "train.py", "flags": words, **more}

    # Seven prompts of different lengths: two batches of 4, of which ranks that see different data take one each.
    prompts = folder / "prompts.txt"
    texts = [f"  {document}".replace("\n", " ") for document in tiny.english_documents()[:7]]
    prompts.write_text("\n".join(text[n % 3 : 7 + 3 * n] for n, text in enumerate(texts)))
    measured = ("--eval_dataset", f"en={prepared}", "--eval_interval", "4")
    measured += ("--eval_prompts", prompts, "--eval_prompt_tokens", ANSWER_TOKENS)
    measured += ("--eval_tasks", f"icl,mmlu={mmlu}", "--eval_limit", ITEMS, "--eval_num_fewshot", SHOTS)
    for name, flags in {**FLOAT32_RUNS, **BFLOAT16_RUNS}.items():
        add(name, *measured, *flags)
        if name in UNMEASURED:
            add(f"{name}_unmeasured", *flags)
    zero2 = FLOAT32_RUNS["zero2"]
    add("forgets", *measured, *zero2, "--lr", "1", "--forgetting_alarm", "en=0.1", "--on_forgetting", "stop")
    resumed = ("--lr", "1", "--forgetting_alarm", "en=0.1", "--load_checkpoint", folder / "forgets/ckpt/epoch-0_step-4")
    add("goes_on", *measured, *zero2, *resumed, home="forgets")
    batches = -(-len(datasets.load_from_disk(prepared / "eval")) // 8)
    add("cut_at_0", *measured, *zero2, signal_at=1)
    of_chats = [
        "--dataset",
        chats,
        "--eval_dataset",
        f"own={chats}",
        "--eval_prompts",
        chats.parents[1] / "in/rows.jsonl",
    ]
    of_chats += ["--eval_prompt_tokens", ANSWER_TOKENS, "--micro_batch_size", "1", "--max_steps", "1"]
    of_chats += ["--max_length", CHAT_LENGTH, "--eval_tasks", "icl", "--eval_limit", ITEMS]
    add("chats", *zero2, *of_chats, script="train_sft.py")
    # At the last batch of the evaluation after step 4, so that no prompt of it is answered.
    add("cut_in_tasks", *measured, *zero2, signal_at=2 * (batches + 2 * -(-ITEMS // 8)))
    for name, (place, of) in CUT.items():
        flags = [*measured, *{**FLOAT32_RUNS, **BFLOAT16_RUNS}[of]]
        # Ranks of a pipeline read the same samples and items.
        width = 4 if "pp2" in of else 8
        in_evaluation = -(-len(datasets.load_from_disk(prepared / "eval")) // width) + 2 * -(-ITEMS // width)
        add(name, *flags, signal_at=place * in_evaluation + 2)
        for again in ("resumed", "done"):
            add(f"{name}_{again}", *flags, "--resume", "auto", home=name)
    sets = [f"old={plain}", f"en={prepared / 'eval'}", f"cut={prepared.parent / 'cut' / 'arrow'}"]
    add("plain", *zero2, "--eval_dataset", *sets, "--document_mask", "off")
    launch(folder, [spec for name, spec in specs.items() if name != "one_rank"])
    ranks = tmp_path_factory.mktemp("one_rank")
    launch(ranks, [specs["one_rank"]], ranks=1)
    shutil.copy(ranks / "one_rank.json", folder)
    return {name: finished(folder, spec) for name, spec in specs.items()}


def history(job: Job) -> list:
    """The evaluations that the last checkpoint records."""
    last = (job.folder / "ckpt" / "latest").read_text().strip()
    return json.loads((job.folder / "ckpt" / last / "running_states.json").read_text())["evaluations"]


@torch.no_grad()
def plain_figures(model, eval_dir: Path, *, apart: bool = True) -> dict[str, float]:
    """With transformers only: each document separately through the model, or each sample as one if not `apart`."""
    nats, predicted, target_bytes = 0.0, 0, 0
    for sample in datasets.load_from_disk(eval_dir):
        start = 0
        for length in sample["sequence_lengths"] if apart else [len(sample["input_ids"])]:
            ids, labels = (torch.tensor(sample[name][start : start + length]) for name in ("input_ids", "labels"))
            start += length
            logits = model(ids[None]).logits[0, :-1].float()
            nats += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
            predicted += int((labels[1:] != -100).sum())
        target_bytes += sum(sample["document_target_bytes"])
    loss = nats / predicted
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": nats / math.log(2) / target_bytes}


@pytest.mark.parametrize("name", [*FLOAT32_RUNS, *BFLOAT16_RUNS])
def test_figures_are_those_of_transformers(jobs, prepared, model_dir, name):
    assert jobs[name].error is None
    entries = history(jobs[name])
    assert [entry["step"] for entry in entries][:2] == [0, 4] and len(entries) >= 3
    first, last = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model_dir, jobs[name].model))
    exact = name in FLOAT32_RUNS
    for model, entry in ((first if exact else first.bfloat16().float(), entries[0]), (last.float(), entries[-1])):
        expected = plain_figures(model, prepared / "eval")
        for key, value in expected.items():
            # The exponent of the perplexity turns an absolute error into a relative one.
            scale = 1 if key != "perplexity" else expected["loss"]
            assert entry["figures"]["en"][key] == pytest.approx(value, rel=(1e-6 if exact else 1e-3) * scale), key
    assert jobs[name].scalars("Evaluation/en/bits_per_byte") == pytest.approx(
        [entry["figures"]["en"]["bits_per_byte"] for entry in entries]
    )


def test_the_evaluation_command_has_the_figure_of_training(jobs, prepared, model_dir, tmp_path, monkeypatch):
    """From the texts of the held-out documents, divided where --max_length divides them."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    begins = set()
    for sample in datasets.load_from_disk(prepared / "eval"):
        bounds = pairwise(accumulate(sample["sequence_lengths"], initial=0))
        pieces = [sample["input_ids"][slice(*places)] for places in bounds]
        begins |= {tokenizer.decode(ids[1:], skip_special_tokens=True) for ids in pieces if ids[0] == 1}
    rows = [json.loads(line) for line in (prepared.parent / "en" / "text.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if (row.get("source", "") + row["target"]).startswith(tuple(begins))]
    path = preparing.write_lines(tmp_path / "en.jsonl", held_out)
    monkeypatch.setattr(text_task, "positions_of", lambda config: LENGTH)
    model, _ = load_model(str(model_dir), "cpu", dtype="fp32")
    task = TextTask(path, limit=None)
    found = [record for some in records_of(model, tokenizer, str(model_dir), task, batch_size=8) for record in some]
    known = history(jobs["zero2"])[0]["figures"]["en"]
    assert result_of("m", task, found).score.value == pytest.approx(known["bits_per_byte"], rel=1e-6)


def test_figures_do_not_depend_on_plugin_or_ranks(jobs):
    firsts = [history(jobs[name])[0]["figures"]["en"]["bits_per_byte"] for name in FLOAT32_RUNS]
    assert firsts == pytest.approx([firsts[0]] * len(firsts), rel=1e-6)


@pytest.mark.parametrize("name", UNMEASURED)
def test_evaluation_leaves_the_training_as_it_is(jobs, name):
    assert jobs[f"{name}_unmeasured"].error is None
    with_it, without = (weights_of(jobs[job]) for job in (name, f"{name}_unmeasured"))
    assert all(torch.equal(with_it[key], without[key]) for key in without)


def scores_of_command(folder: Path, mmlu: Path, dtype: str) -> dict[str, float]:
    """The accuracies of an exported model, by the code of python -m colossal_llama2.evaluation."""
    model, tokenizer = load_model(str(folder), "cpu", dtype=dtype)
    found = {}
    for task in read_tasks([("icl", None), ("mmlu", mmlu)], num_fewshot=SHOTS, limit=ITEMS, seed=0):
        records = [
            record for some in records_of(model, tokenizer, str(folder), task, batch_size=None) for record in some
        ]
        found[task.name] = result_of("m", task, records).score
    return found


@pytest.fixture(scope="module")
def right_before(model_dir, mmlu):
    """The same of the model before it is trained, by precision."""
    return {dtype: scores_of_command(model_dir, mmlu, dtype) for dtype in ("fp32", "bf16")}


@pytest.mark.parametrize("name", [*FLOAT32_RUNS, *BFLOAT16_RUNS])
def test_accuracies_are_those_of_the_evaluation_command(jobs, right_before, mmlu, name):
    dtype = "fp32" if name in FLOAT32_RUNS else "bf16"
    entries = history(jobs[name])
    for entry, expected in (
        (entries[0], right_before[dtype]),
        (entries[-1], scores_of_command(jobs[name].model, mmlu, dtype)),
    ):
        for task, score in expected.items():
            figures = entry["figures"][task]
            # In bf16, logits may be equal, and a matrix in two halves adds rounded sums.
            allowed = 0 if dtype == "fp32" else 1 / ITEMS
            assert figures["accuracy"] == pytest.approx(score.value, abs=allowed + 1e-9), (entry["step"], task)
            if figures["accuracy"] == score.value:
                assert figures["standard_error"] == score.error
    for task in ("icl", "mmlu"):
        assert jobs[name].scalars(f"Evaluation/{task}/accuracy") == pytest.approx(
            [entry["figures"][task]["accuracy"] for entry in entries]
        )


@pytest.mark.slow
def test_the_command_prints_the_accuracy_of_the_last_step(jobs, mmlu, tmp_path):
    job, out = jobs["3d_tp2"], tmp_path / "results.jsonl"
    words = ["--tasks", f"icl,mmlu={mmlu}", "--limit", ITEMS, "--num_fewshot", SHOTS, "--output_file", out]
    words = ["-m", "colossal_llama2.evaluation", "--model_path", job.model, "--device", "cpu", *words]
    fork_server.run([str(word) for word in words], timeout=120)
    results = {found["task"]: found["score"] for found in json.loads(out.with_suffix(".json").read_text())["results"]}
    last = history(job)[-1]["figures"]
    for task in ("icl", "mmlu"):
        score = results[task]
        assert last[task] == {"accuracy": score["value"], "standard_error": score["error"], "items": score["items"]}


def test_accuracies_are_in_the_card(jobs):
    card = (jobs["zero2"].model / "README.md").read_text().split("## Evaluation\n")[1].split("\n## ")[0]
    entries = history(jobs["zero2"])
    assert "| task | after step | accuracy | standard error | items |" in card
    for entry in (entries[0], entries[-1]):
        found = entry["figures"]["mmlu"]
        shown = f"{found['accuracy']:.1%} | {found['standard_error']:.1%} | {found['items']}"
        assert f"| mmlu | {entry['step']} | {shown} |" in card
    assert f"| icl | {entries[-1]['step']} | " in card and "| en | 0 | " in card


def test_conversations_train_with_tasks_too(jobs, mmlu):
    """In plain text, as the command asks a model of train_sft.py."""
    last = history(jobs["chats"])[-1]["figures"]["icl"]["accuracy"]
    assert last == scores_of_command(jobs["chats"].model, mmlu, "fp32")["icl"].value


def answers(job: Job) -> dict[int, list[dict]]:
    """The answers to --eval_prompts, by step."""
    records = train_log.read(job.folder / "ckpt" / "train_log.jsonl")
    return {record["step"]: record["answers"] for record in records if "answers" in record}


@pytest.mark.parametrize("name", [*FLOAT32_RUNS, *BFLOAT16_RUNS])
def test_prompts_are_answered_as_inference_answers_them(jobs, prepared, model_dir, name):
    found, steps = answers(jobs[name]), [entry["step"] for entry in history(jobs[name])]
    assert list(found) == steps
    for folder, step in ((model_dir, 0), (jobs[name].model, steps[-1])):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model = model.float() if name in FLOAT32_RUNS else model.bfloat16()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        expected = [generate(model, tokenizer, answer["prompt"] + PROMPT_SUFFIX, GREEDY) for answer in found[step]]
        different = sum(answer["answer"] != right for answer, right in zip(found[step], expected, strict=True))
        # In bf16 a matrix in two halves adds rounded sums, which may swap two tokens that are almost equally likely.
        assert different <= (name == "3d_tp2_bf16")
    prompts = (jobs[name].folder.parent / "prompts.txt").read_text().split("\n")
    assert [answer["prompt"] for answer in found[0]] == prompts
    assert len(found[0]) == 7 and found[0] != found[steps[-1]]


def test_conversations_are_answered_in_their_chat_template(jobs, chats):
    """As inference answers with the exported folder; the last answer of a conversation is not part of its prompt."""
    job = jobs["chats"]
    assert job.error is None
    model, tokenizer = AutoModelForCausalLM.from_pretrained(job.model), AutoTokenizer.from_pretrained(job.model)
    *_, last = answers(job).values()
    prompts = read_prompts(chats.parents[1] / "in" / "rows.jsonl")
    assert [prompt.text for prompt in prompts] == [answer["prompt"] for answer in last]
    # The card has a row for each, also for the two that end with the same question.
    card = (job.model / "README.md").read_text().split("## Answers\n")[1].split("\n## ")[0]
    assert card.count("\n| b? |") == 2
    for prompt, answer in zip(prompts, last, strict=True):
        ids = chat_ids(tokenizer, prompt.messages)
        tokens = [step[0] for step in generate_tokens(model, tokenizer, [ids], GREEDY)]
        assert answer["tokens"] == len(tokens)
        stream = TextStream(tokenizer)
        assert answer["answer"] == "".join(map(stream.push, tokens)) + stream.end()


def test_answers_are_in_the_reports(jobs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = answers(jobs["zero2"])
    events = EventAccumulator(str(jobs["zero2"].folder / "tb"), size_guidance={"tensors": 0})
    events.Reload()
    assert events.SummaryMetadata("Answers/07").plugin_data.plugin_name == "text"
    shown = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("Answers/07")}
    assert shown == {step: reporter.answer_text(of_step[6]) for step, of_step in found.items()}
    assert plain(found[0][6]["prompt"]) in shown[0] and shown[0].endswith(" ...")
    card = (jobs["zero2"].model / "README.md").read_text().split("## Answers\n")[1].split("\n## ")[0]
    last = list(found)[-1]
    assert f"| prompt | answer after step 0 | answer after step {last} |" in card
    row = [plain(found[step][0]["answer"]) + " ..." for step in (0, last)]
    assert f"| {plain(found[0][0]['prompt'])} | {row[0]} | {row[1]} |" in card


def test_forgetting_ends_the_run_and_is_saved(jobs):
    error = jobs["forgets"].error
    assert "--forgetting_alarm en=0.1: bits per byte of en went from" in error and "epoch-0_step-4" in error
    assert jobs["goes_on"].error is None
    entries = history(jobs["goes_on"])
    assert [entry["step"] for entry in entries] == [0, 4, 7]
    assert entries[1]["figures"]["en"]["bits_per_byte"] > 1.1 * entries[0]["figures"]["en"]["bits_per_byte"]


@pytest.mark.parametrize("name", CUT)
def test_a_signal_interrupts_an_evaluation_and_a_resume_repeats_it(jobs, name):
    place, of = CUT[name]
    cut, resumed, whole = jobs[name], jobs[f"{name}_resumed"], jobs[of]
    entries = history(whole)
    step = entries[place]["step"]
    ends = f"SIGTERM after step {step}, which is " + ("the last; the model is in" if place == 2 else "saved; continue")
    assert cut.error.startswith(ends) and cut.after == 0
    assert resumed.error is None and jobs[f"{name}_done"].error is None
    checkpoint = json.loads((cut.folder / f"ckpt/epoch-0_step-{step}/running_states.json").read_text())
    left = entries if place == 2 else [*entries[:place], {"step": step, "figures": {}}]
    assert checkpoint["evaluations"] == left and history(resumed) == entries
    logged = list(train_log.read(cut.folder / "ckpt" / "train_log.jsonl"))
    assert [record["step"] for record in logged if "evaluation" in record] == [entry["step"] for entry in entries]
    table = [(run.model / "README.md").read_text().split("## Settings")[0] for run in (resumed, whole)]
    assert table[0] == table[1] and f"| en | {entries[-1]['step']} |" in table[0]
    found, expected = weights_of(resumed), weights_of(whole)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_signal_interrupts_tasks(jobs):
    cut = jobs["cut_in_tasks"]
    assert cut.after == 0
    assert cut.error.startswith("SIGTERM after step 4") and list(answers(cut)) == [0]
    checkpoint = json.loads((cut.folder / "ckpt/epoch-0_step-4/running_states.json").read_text())
    assert checkpoint["evaluations"][-1] == {"step": 4, "figures": {}}


def test_a_signal_in_the_first_evaluation_leaves_nothing(jobs):
    assert jobs["cut_at_0"].error == "SIGTERM came before the first step; nothing was trained"
    assert jobs["cut_at_0"].after == 0 and not list((jobs["cut_at_0"].folder / "ckpt").glob("epoch*"))


def test_several_sets_and_one_without_bytes(jobs, prepared, model_dir):
    """Without a document mask, <s> and other first tokens of documents are not measured if the borders are recorded."""
    first = history(jobs["plain"])[0]["figures"]
    assert list(first) == ["old", "en", "cut"] and sorted(first["old"]) == ["loss", "perplexity"]
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    expected = plain_figures(model, prepared / "eval", apart=False)
    assert first["old"]["loss"] == pytest.approx(expected["loss"], rel=1e-5) != first["en"]["loss"]
    processor = bits_per_byte.load_processor(model_dir / "tokenizer.model")
    for name, folder in (("en", prepared / "eval"), ("cut", prepared.parent / "cut" / "arrow" / "eval")):
        right = bits_per_byte.figure(folder, model, processor, apart=False)
        assert first[name]["bits_per_byte"] == pytest.approx(right, rel=1e-6)
    known = history(jobs["zero2"])[0]["figures"]["en"]["bits_per_byte"]
    assert known == pytest.approx(bits_per_byte.figure(prepared / "eval", model, processor), rel=1e-6)


def test_flags_that_cannot_be_used_are_reported(run_forked, assert_user_error, prepared, model_dir, tmp_path):
    flags = ["--pretrained", model_dir, "--dataset", prepared, "--save_dir", tmp_path / "ckpt"]
    process = run_forked(
        "train.py",
        *flags,
        "--eval_dataset",
        "en=nowhere",
        f"en={prepared}",
        f"en={prepared / 'eval'}",
        "--forgetting_alarm",
        "zh=0.1",
        cwd=tmp_path,
    )
    words = ("en=nowhere: holds no prepared samples", "the name en is used twice", "--forgetting_alarm zh: there is no")
    assert_user_error(process, *words)
    assert_user_error(run_forked("train.py", *flags, "--eval_interval", "5", cwd=tmp_path), "needs --eval_dataset")
    assert_user_error(run_forked("train.py", *flags, "--eval_dataset", "x", cwd=tmp_path), "NAME=PATH allowed")
    assert not (tmp_path / "ckpt").exists()
