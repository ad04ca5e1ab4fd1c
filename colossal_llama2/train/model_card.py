"""The model card of a trained model: README.md with the front matter that model hubs read, and tables for people.

It says only what the same run says again, if it is killed and resumed: no times, no paths of checkpoints.
"""

import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

from colossal_llama2.dataset.groups import Amount
from colossal_llama2.dataset.measuring import SourceRead
from colossal_llama2.train.checkpoint import CARD_NAME, STATES_NAME
from colossal_llama2.train.checkpoint_files import MODEL_NAME

# Two-letter codes of ISO 639-1, by which hubs sort models.
LANGUAGES = frozenset(
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en "
    "eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv "
    "ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne "
    "ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st "
    "su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu".split()
)
# Of the settings: places on a disk, what is told elsewhere in the card, and what has no part in the model.
NOT_SETTINGS = (
    "pretrained", "dataset", "save_dir", "tensorboard_dir", "config_file", "load_config", "load_checkpoint", "resume",
    "save_interval", "keep_last", "keep_every", "max_bad_steps", "dist_timeout", "eval_dataset", "benchmark",
    "num_samples", "profile", "peak_tflops", "dry_run", "num_ranks", "stage", "pad_token", "versions", "world_size",
    "total_steps",
)  # fmt: skip
# The final loss is the mean over a tenth of the run, and over at most so many steps.
FINAL_STEPS = 100
HOW = {"pretrain": "Continued pre-training", "sft": "Supervised fine-tuning"}


def render(
    *,
    settings: Dict[str, Any],
    base_model: str,
    amounts: Sequence[Amount],
    records: Iterable[Dict[str, Any]],
    tokens_seen: int,
    skipped_steps: int = 0,
    sources: Sequence[str] = (),
    read: Sequence[SourceRead] = (),
) -> str:
    """The text of the card.

    Args:
        settings: what --config_file holds.
        base_model: the name of the model that the weights come from.
        amounts: how much data of each source and category there is.
        records: those of train_log.jsonl.
        tokens_seen: over all epochs, padding not counted.
        skipped_steps: steps that made no update.
        sources: names of the folders of --dataset.
        read: what the run has read of each of them.
    """
    losses, evaluations = _curves(records)
    parts = [
        _front_matter(base_model, [*sources, *(amount.source for amount in amounts), *evaluations]),
        f"# {HOW[settings['stage']]} of {base_model}",
        _how(settings, tokens_seen, losses, skipped_steps),
        _data(amounts, read, settings),
        _evaluation(evaluations),
        "## Settings\n\n" + _table(["flag", "value"], [[f"`--{k}`", _cell(v)] for k, v in _told(settings).items()]),
        "## Software\n\n" + _table(["package", "version"], [[k, v] for k, v in settings["versions"].items() if v]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_model(model_path: str) -> str:
    """The name of the model that these weights come from.

    That in the card of the folder; of a checkpoint's model, that which its run began with; or else the folder's own.
    """
    folder = Path(model_path).absolute()
    named = _named_by_card(folder / CARD_NAME)
    if named is not None:
        return named
    if folder.name != MODEL_NAME:
        return folder.name
    try:
        states = json.loads(folder.with_name(STATES_NAME).read_bytes())
        known, pretrained = states.get("base_model"), states.get("settings", {}).get("pretrained")
    except (OSError, ValueError, AttributeError):
        known = pretrained = None
    if isinstance(known, str):
        return known
    # Checkpoints of earlier versions.
    is_other = isinstance(pretrained, str) and Path(pretrained).absolute() != folder
    return base_model(pretrained) if is_other else folder.parent.name


def _named_by_card(card: Path) -> Optional[str]:
    import yaml

    try:
        text = card.read_text(encoding="utf-8", errors="replace")
        named = yaml.safe_load(text.split("---\n")[1])["base_model"] if text.startswith("---\n") else None
    except (OSError, yaml.YAMLError, IndexError, KeyError, TypeError):
        return None
    return named if isinstance(named, str) else None


def _front_matter(base_model: str, names: Sequence[str]) -> str:
    import yaml

    matter: Dict[str, Any] = {"base_model": base_model}
    languages = sorted({name for name in names if name in LANGUAGES})
    if languages:
        matter["language"] = languages
    matter.update(library_name="transformers", pipeline_tag="text-generation", tags=["llama", "colossal-llama-2"])
    return "---\n" + yaml.safe_dump(matter, sort_keys=False, allow_unicode=True) + "---"


def _curves(records: Iterable[Dict[str, Any]]) -> tuple:
    losses: List[float] = []
    evaluations: Dict[str, Dict[int, Dict[str, float]]] = {}
    for record in records:
        if record.get("loss") is not None:
            losses.append(record["loss"])
        for name, figures in record.get("evaluation", {}).items():
            evaluations.setdefault(name, {}).setdefault(record["step"], {}).update(figures)
    return losses, evaluations


def _how(settings: Dict[str, Any], tokens_seen: int, losses: List[float], skipped_steps: int) -> str:
    ranks = settings["world_size"]
    lines = [
        "## Training\n",
        f"{HOW[settings['stage']]} with ColossalAI's plugin {settings['plugin']} in {settings['mixed_precision']}, "
        f"on {ranks} rank{'s' if ranks > 1 else ''}.\n",
    ]
    rows = [
        ["optimizer steps", f"{settings['total_steps']:,}"],
        *([["of them without an update", f"{skipped_steps:,}"]] if skipped_steps else []),
        ["epochs", f"{settings['num_epochs']:,}"],
        ["tokens, padding not counted", f"{tokens_seen:,}"],
    ]
    if losses:
        last = losses[-min(FINAL_STEPS, max(len(losses) // 10, 1)) :]
        rows.append([f"final loss, mean of the last {len(last)} steps", f"{sum(last) / len(last):.4f}"])
        rows.append(["loss of the first step", f"{losses[0]:.4f}"])
    return "\n".join(lines) + "\n" + _table(["what", "figure"], rows)


def _data(amounts: Sequence[Amount], read: Sequence[SourceRead], settings: Dict[str, Any]) -> str:
    parts = [_read(read, settings), _amounts(amounts, settings)]
    return "\n\n".join(["## Data", *filter(None, parts)]) if any(parts) else ""


def _read(read: Sequence[SourceRead], settings: Dict[str, Any]) -> str:
    """What was trained, by source; a sample that was read again counts again."""
    total = sum(one.tokens for one in read)
    if not total:
        return ""
    rows = [
        [
            one.source, f"{one.samples_there:,}", f"{one.samples:,}", f"{one.samples / max(one.samples_there, 1):.2f}",
            f"{one.tokens:,}", f"{one.tokens / total:.1%}",
        ]
        for one in read
    ]  # fmt: skip
    sums = (f"{sum(values):,}" for values in zip(*(one[1:] for one in read), strict=True))
    there, samples, tokens = sums
    rows.append(["all", there, samples, "", tokens, "100.0%"])
    columns = ["source of the training", "samples there", "samples read", "times read", "tokens read", "share"]
    asked = f" Asked for: `{_cell(settings['mixture'])}`." if settings.get("mixture") else ""
    return f"What training has read.{asked}\n\n" + _table(columns, rows)


def _amounts(amounts: Sequence[Amount], settings: Dict[str, Any]) -> str:
    """What there is, by source and category of documents."""
    if not amounts:
        return ""
    total = sum(amount.tokens for amount in amounts)
    rows = [
        [amount.source, amount.category, f"{amount.pieces:,}", f"{amount.tokens:,}", f"{amount.tokens / total:.1%}"]
        for amount in amounts
    ]
    rows.append(["all", "", f"{sum(amount.pieces for amount in amounts):,}", f"{total:,}", "100.0%"])
    columns = ["source", "category", "documents", "tokens", "share"]
    what = "What was there to take from" if settings.get("mixture") else "One epoch"
    what += ", by source of the documents; a document that was cut counts once for each piece."
    return f"{what}\n\n" + _table(columns, rows)


def _evaluation(evaluations: Dict[str, Dict[int, Dict[str, float]]]) -> str:
    """The first and the last figures of each evaluated data."""
    if not evaluations:
        return ""
    names = list(dict.fromkeys(n for found in evaluations.values() for figures in found.values() for n in figures))
    rows = []
    for data, found in evaluations.items():
        for step in sorted({min(found), max(found)}):
            rows.append([data, f"{step:,}", *(_figure(found[step].get(name)) for name in names)])
    return "## Evaluation\n\n" + _table(["data", "after step", *(name.replace("_", " ") for name in names)], rows)


def _told(settings: Dict[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in NOT_SETTINGS and value is not None}


def _figure(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.4f}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    escape: Callable[[str], str] = lambda text: text.replace("|", "\\|").replace("\n", " ")  # noqa: E731
    lines = [list(columns), ["---"] * len(columns), *([escape(str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
