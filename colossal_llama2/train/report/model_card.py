"""The model card of a trained model: README.md with the front matter that model hubs read, and tables for people.

It has no times and no paths of checkpoints, so that a run that is killed and resumed gets the same card.

On the Hub, `base_model` of the front matter is the Hub identifier of the model that this one was fine-tuned from
(https://huggingface.co/docs/hub/model-cards, "Specifying a base model"). The folders between two stages have no such
identifier, so it is the model that the first stage began with; the table of stages names the folders.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from colossal_llama2.cli.dependent_flags import is_on_card
from colossal_llama2.corpus.category_names import category_name
from colossal_llama2.dataset.read.loss_groups import Amount
from colossal_llama2.dataset.read.token_counts import SourceRead
from colossal_llama2.markdown import Markup, code, front_matter, plain, table
from colossal_llama2.model.training_history import is_name, name_of, named_by_card, read_history
from colossal_llama2.plurals import counted
from colossal_llama2.storage import json_input
from colossal_llama2.terminal_text import one_line
from colossal_llama2.train.run_folder.file_names import CARD_NAME, MODEL_NAME, STATES_NAME

# Two-letter codes of ISO 639-1, by which hubs sort models.
LANGUAGES = frozenset(
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en "
    "eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv "
    "ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne "
    "ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st "
    "su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu".split()
)
# The final loss is the mean over the last tenth of the run, but over at most this many steps.
FINAL_STEPS = 100
HOW = {
    "vocabulary": "Extension of the vocabulary",
    "pretrain": "Continued pre-training",
    "sft": "Supervised fine-tuning",
}
# Sources of a stage that the table lists; training_history.json has all of them.
MAX_SOURCES = 8
# Most steps from a checkpoint of an earlier version back to the --pretrained of its run.
MAX_FOLLOWED = 16
NOT_RECORDED = "not recorded"
# Of an answer; train_log.jsonl has all of them.
ANSWER_CHARACTERS = 300
LOSSES = ("first_loss", "final_loss")


def render(
    *,
    settings: dict[str, Any],
    base_model: str,
    amounts: Sequence[Amount],
    records: Iterable[dict[str, Any]],
    tokens_seen: int,
    skipped_steps: int = 0,
    sources: Sequence[str] = (),
    read: Sequence[SourceRead] = (),
    stages: Sequence[dict[str, Any]] = (),
) -> str:
    """The text of the card.

    Args:
        settings: the content of --config_file.
        base_model: the name of the model that the weights come from.
        amounts: documents and tokens of each source and category.
        records: those of train_log.jsonl.
        tokens_seen: over all epochs, padding not counted.
        skipped_steps: steps that made no update.
        sources: names of the folders of --dataset.
        read: samples and tokens that the run read from each of them.
        stages: those of training_history.json, this run last; the rest of the card is about this run alone.
    """
    answers: dict[int, list[dict[str, Any]]] = {}
    losses, evaluations = curves(_noting_answers(records, answers))
    of_last = " of the last stage" if len(stages) > 1 else ""
    settings_rows = [[code(f"--{name}"), _cell(value)] for name, value in card_settings(settings).items()]
    versions = [[name, version] for name, version in settings["versions"].items() if version]
    earlier = [source["source"] for stage in stages for source in stage.get("data", ())]
    parts = [
        _front_matter(
            base_model,
            [*sources, *(amount.source for amount in amounts), *evaluations, *earlier],
            is_adapter=settings.get("lora_rank") is not None,
        ),
        f"# {_title(stages, settings)} of {plain(base_model)}",
        _stages(base_model, stages),
        _how(settings, tokens_seen, losses, skipped_steps, of_last),
        _data(amounts, read, settings, of_last),
        _evaluation(evaluations, of_last),
        _answers(answers, of_last),
        f"## Settings{of_last}\n\n" + table(["flag", "value"], settings_rows),
        f"## Software{of_last}\n\n" + table(["package", "version"], versions),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_model(model_path: str) -> str:
    """The name of the model that these weights come from.

    It is the name in the folder's history or card; for a checkpoint's model, the name of the model that its run began
    with; else the folder's own name. The folder is untrusted, so unreadable files are ignored. For one rank.
    """
    for _ in range(MAX_FOLLOWED):
        folder = Path(model_path).absolute()
        named = read_history(folder).base_model or named_by_card(folder / CARD_NAME)
        if named is not None:
            return named
        if folder.name != MODEL_NAME:
            break
        known, pretrained = _named_by_states(folder.with_name(STATES_NAME))
        if known is not None:
            return known
        # Checkpoints of earlier versions record only the folder.
        if pretrained is None or Path(pretrained).absolute() == folder:
            break
        model_path = pretrained
    return name_of(model_path)


def _named_by_states(path: Path) -> tuple[str | None, str | None]:
    """The base model and the --pretrained in a checkpoint's running_states.json; None for an entry that is missing."""
    try:
        states = json_input.read_object(path)
        settings = json_input.typed(states, "settings", dict) if "settings" in states else {}
    except (OSError, ValueError):
        return None, None
    known, pretrained = states.get("base_model"), settings.get("pretrained")
    is_path = isinstance(pretrained, str) and is_name(pretrained) and "\0" not in pretrained
    return known if is_name(known) else None, pretrained if is_path else None


def _front_matter(base_model: str, names: Sequence[str], *, is_adapter: bool) -> str:
    matter: dict[str, Any] = {"base_model": one_line(base_model)}
    if is_adapter:
        matter["base_model_relation"] = "adapter"
    languages = sorted({name for name in names if name in LANGUAGES})
    if languages:
        matter["language"] = languages
    tags = ["llama", "colossal-llama-2", *(["lora"] if is_adapter else [])]
    library = "peft" if is_adapter else "transformers"
    matter.update(library_name=library, pipeline_tag="text-generation", tags=tags)
    return front_matter(matter)


def _title(stages: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """All kinds of stages, each once: "Continued pre-training and supervised fine-tuning"."""
    kinds = dict.fromkeys(stage["stage"] for stage in stages) or [settings["stage"]]
    *names, last = (HOW[kind] for kind in kinds)
    text = " and ".join([", ".join(names), last] if names else [last])
    return text[0] + text[1:].lower()


def _stages(base_model: str, stages: Sequence[dict[str, Any]]) -> str:
    """The table of all stages, from their records, with sums."""
    if not stages:
        return ""
    rows = [[f"{number}. {HOW[stage['stage']]}", *_stage_cells(stage)] for number, stage in enumerate(stages, start=1)]
    trained = [stage for stage in stages if stage["stage"] != "vocabulary"]
    sums = [_sum([stage.get(name) for stage in trained]) for name in ("steps", "tokens")]
    rows.append(["all", "", "", *sums, "", ""])
    columns = [
        "stage",
        "began with",
        "tokens read, by source",
        "optimizer steps",
        "tokens, padding not counted",
        "loss of the first step",
        "final loss",
    ]
    text = f"Base model: {plain(base_model)}."
    if len(stages) > 1:
        text += " Everything below the table is about the last stage only."
    return f"## Stages\n\n{text}\n\n" + table(columns, rows)


def _stage_cells(stage: dict[str, Any]) -> list[str]:
    parent = stage["parent"]
    began = parent["name"] if parent.get("as_recorded", True) else f"{parent['name']}, changed since the stage before"
    if stage["stage"] == "vocabulary":
        sizes = [_count(stage.get(name)) for name in ("vocabulary_before", "vocabulary")]
        padding = f", {_count(stage['padding_rows'])} of them rows without a token" if stage.get("padding_rows") else ""
        return [began, f"vocabulary of {sizes[0]}, now {sizes[1]}{padding}", "", "", "", ""]
    data = stage.get("data", [])
    shown = ", ".join(f"{source['source']} {_count(source.get('tokens'))}" for source in data[:MAX_SOURCES])
    shown += f", and {counted(len(data) - MAX_SOURCES, 'more source')}" if len(data) > MAX_SOURCES else ""
    first, final = (NOT_RECORDED if stage.get(name) is None else _figure(stage[name]) for name in LOSSES)
    if stage.get("final_loss_steps", 0) > 1 and stage.get("final_loss") is not None:
        final += f" (mean of {counted(stage['final_loss_steps'], 'step')})"
    steps = _count(stage.get("steps"))
    if stage.get("updates", stage.get("steps")) != stage.get("steps"):
        steps += f" ({stage['updates']:,} of them with an update)"
    return [began, shown or NOT_RECORDED, steps, _count(stage.get("tokens")), first, final]


def _count(value: int | None) -> str:
    return NOT_RECORDED if value is None else f"{value:,}"


def _sum(values: Sequence[int | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known):,}" + ("" if len(known) == len(values) else " and more that is not recorded")


def curves(records: Iterable[dict[str, Any]]) -> tuple[list[float], dict[str, dict[int, dict[str, float]]]]:
    """The losses of all steps that have one, and the figures of evaluations by set or task, and step."""
    losses: list[float] = []
    evaluations: dict[str, dict[int, dict[str, float]]] = {}
    for record in records:
        if record.get("loss") is not None:
            losses.append(record["loss"])
        for name, figures in record.get("evaluation", {}).items():
            evaluations.setdefault(name, {}).setdefault(record["step"], {}).update(figures)
    return losses, evaluations


def final_loss(losses: Sequence[float]) -> tuple[float, int]:
    """The mean loss at the end of a run, and the number of steps that it is the mean of."""
    last = losses[-min(FINAL_STEPS, max(len(losses) // 10, 1)) :]
    return sum(last) / len(last), len(last)


def _how(settings: dict[str, Any], tokens_seen: int, losses: list[float], skipped_steps: int, of_last: str) -> str:
    ranks, plugin = settings["world_size"], plain(settings["plugin"])
    adapter = "" if settings.get("lora_rank") is None else f" of a LoRA adapter of rank {settings['lora_rank']}"
    lines = [
        f"## Training{of_last}\n",
        f"{HOW[settings['stage']]}{adapter} with ColossalAI's plugin {plugin} in {settings['mixed_precision']}, "
        f"on {counted(ranks, 'rank')}.\n",
    ]
    rows = [
        ["optimizer steps", f"{settings['total_steps']:,}"],
        *([["of them without an update", f"{skipped_steps:,}"]] if skipped_steps else []),
        ["epochs", f"{settings['num_epochs']:,}"],
        ["tokens, padding not counted", f"{tokens_seen:,}"],
    ]
    if losses:
        mean, count = final_loss(losses)
        of_last_steps = f", mean of the last {count:,} steps" if count > 1 else ""
        rows.append([f"final loss{of_last_steps}", f"{mean:.4f}"])
        rows.append(["loss of the first step", f"{losses[0]:.4f}"])
    return "\n".join(lines) + "\n" + table(["what", "figure"], rows)


def _data(amounts: Sequence[Amount], read: Sequence[SourceRead], settings: dict[str, Any], of_last: str) -> str:
    parts = [_read(read, settings), _amounts(amounts, settings)]
    return "\n\n".join([f"## Data{of_last}", *filter(None, parts)]) if any(parts) else ""


def _read(read: Sequence[SourceRead], settings: dict[str, Any]) -> str:
    """Samples and tokens that were read, by source, repeats counted."""
    total = sum(source_read.tokens for source_read in read)
    if not total:
        return ""
    rows = [
        [
            source_read.source,
            f"{source_read.samples_there:,}",
            f"{source_read.samples:,}",
            f"{source_read.samples / max(source_read.samples_there, 1):.2f}",
            f"{source_read.tokens:,}",
            f"{source_read.tokens / total:.1%}",
        ]
        for source_read in read
    ]
    sums = (f"{sum(values):,}" for values in zip(*(source_read[1:] for source_read in read), strict=True))
    there, samples, tokens = sums
    rows.append(["all", there, samples, "", tokens, "100.0%"])
    columns = ["source of the training", "samples there", "samples read", "times read", "tokens read", "share"]
    asked = f" Asked for: {code(_cell(settings['mixture']))}." if settings.get("mixture") else ""
    return f"What training has read.{asked}\n\n" + table(columns, rows)


def _amounts(amounts: Sequence[Amount], settings: dict[str, Any]) -> str:
    """Documents and tokens of the data, by source and category."""
    if not amounts:
        return ""
    total = sum(amount.tokens for amount in amounts)
    rows = [
        [
            amount.source,
            category_name(amount.category),
            f"{amount.pieces:,}",
            f"{amount.tokens:,}",
            f"{amount.tokens / total:.1%}",
        ]
        for amount in amounts
    ]
    rows.append(["all", "", f"{sum(amount.pieces for amount in amounts):,}", f"{total:,}", "100.0%"])
    columns = ["source", "category", "documents", "tokens", "share"]
    what = "The available data" if settings.get("mixture") else "One epoch"
    what += ", by source of the documents; a document that was cut counts once per piece."
    return f"{what}\n\n" + table(columns, rows)


def _evaluation(evaluations: dict[str, dict[int, dict[str, float]]], of_last: str) -> str:
    """The first and the last figures of each evaluated set and task."""
    tasks = {
        name: found for name, found in evaluations.items() if any("accuracy" in values for values in found.values())
    }
    sets = {name: found for name, found in evaluations.items() if name not in tasks}
    parts = []
    if sets:
        names = list(dict.fromkeys(n for found in sets.values() for figures in found.values() for n in figures))
        columns = ["data", "after step", *(name.replace("_", " ") for name in names)]
        parts.append(table(columns, _first_and_last(sets, lambda values: [_figure(values.get(n)) for n in names])))
    if tasks:
        columns = ["task", "after step", "accuracy", "standard error", "items"]
        rows = _first_and_last(
            tasks,
            lambda values: [
                *(_percent(values.get(name)) for name in ("accuracy", "standard_error")),
                f"{values['items']:,.0f}" if "items" in values else "",
            ],
        )
        parts.append("Accuracies are by the logits of the first predicted token.\n\n" + table(columns, rows))
    return "\n\n".join([f"## Evaluation{of_last}", *parts]) if parts else ""


def _first_and_last(
    evaluations: dict[str, dict[int, dict[str, float]]], cells: Callable[[dict[str, float]], list[str]]
) -> list[list[str]]:
    return [
        [name, f"{step:,}", *cells(found[step])]
        for name, found in evaluations.items()
        for step in sorted({min(found), max(found)})
    ]


def _noting_answers(
    records: Iterable[dict[str, Any]], answers: dict[int, list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """Pass on records, whose log may be too long for memory, and add their answers to `answers`, by step."""
    for record in records:
        if record.get("answers"):
            answers[record["step"]] = record["answers"]
        yield record


def _answers(found: dict[int, list[dict[str, Any]]], of_last: str) -> str:
    """The first and the last answers to each of --eval_prompts, given those of each evaluation by step."""
    if not found:
        return ""
    # By place as well: conversations may end with the same question.
    rows: dict[tuple[int, str], dict[int, Markup]] = {}
    steps = sorted({min(found), max(found)})
    for step in steps:
        for place, answer in enumerate(found[step]):
            rows.setdefault((place, answer["prompt"]), {})[step] = _answer(answer)
    columns = ["prompt", *(f"answer after step {step:,}" for step in steps)]
    cells = [[prompt, *(answers.get(step, "") for step in steps)] for (_, prompt), answers in rows.items()]
    text = "Fixed prompts, answered greedily. An answer that ends with ... was cut."
    return f"## Answers{of_last}\n\n{text}\n\n" + table(columns, cells)


def _answer(answer: dict[str, Any]) -> Markup:
    text = answer["answer"]
    is_cut = answer["is_cut"] or len(text) > ANSWER_CHARACTERS
    return Markup(plain(text[:ANSWER_CHARACTERS]) + (" ..." if is_cut else ""))


def card_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that the card lists: they have a part in the model and name no place on a disk."""
    return {name: value for name, value in settings.items() if is_on_card(name) and value is not None}


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
