"""What is wrong with the settings of a step, before anything is built. Imports neither torch nor ColossalAI.

Here, in `Plugin.problems` and in `Trainable.problems`, settings are called by their flags: the sentences are for users,
and each names its flags once or twice, so a table from settings to flags would be longer and no safer.
"""

from colossal_llama2.engine.plugins import plugin_of
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.model.loading import ModelFacts
from colossal_llama2.plurals import counted


def settings_problems(settings: EngineSettings, world_size: int) -> list[str]:
    """The problems of the settings for this number of ranks: one sentence each, none if they can run."""
    problems = plugin_of(settings).problems()
    if world_size % settings.model_ranks:
        sizes = {"--tp": settings.tp_size, "--pp": settings.pp_size, "--sp": settings.sp_size}
        given = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1)
        problems.append(f"{given} does not divide the {world_size} processes of this job")
    problems += settings.trainable.problems(
        pp_size=settings.pp_size,
        chunked_loss=settings.chunked_loss,
        tp_size=settings.tp_size,
    )
    return problems + _pipeline_problems(settings) + _sequence_problems(settings)


def split_problems(settings: EngineSettings, model: ModelFacts) -> list[str]:
    """Why the ranks of these settings cannot split this model, one sentence each."""
    problems = []
    # Sequence-parallel ranks exchange whole heads, as tensor-parallel ranks hold them.
    splits = settings.tp_size * settings.sp_size
    if model.attention_heads % splits or model.key_value_heads % splits:
        given = f"--tp {settings.tp_size}"
        given += "" if settings.sp_size == 1 else f" x --sp {settings.sp_size}"
        problems.append(
            f"{given} does not divide the model's {model.attention_heads} attention heads "
            f"and {model.key_value_heads} key-value heads; give a number that does"
        )
    if model.layers < settings.pp_size:
        problems.append(
            f"--pp {settings.pp_size} given, the model has {counted(model.layers, 'layer')}; "
            f"give at most that many stages"
        )
    return problems


def length_problems(settings: EngineSettings, max_length: int) -> list[str]:
    """Why samples of that many tokens cannot be split, one sentence each."""
    if max_length % settings.sequence_shards == 0:
        return []
    return [f"--max_length {max_length} cannot be split in {settings.sequence_shards} equal parts"]


def _pipeline_problems(settings: EngineSettings) -> list[str]:
    if settings.pp_size == 1:
        return []
    problems = []
    batch, part = settings.micro_batch_size, settings.microbatch_size
    if batch % part or batch // part < settings.pp_size:
        problems.append(
            f"--micro_batch_size {batch} with --microbatch_size {part} cannot keep {settings.pp_size} pipeline stages "
            f"busy; give a multiple of --microbatch_size, at least {settings.pp_size * part}"
        )
    if settings.zero_stage == 2:
        problems.append(f"--pp {settings.pp_size} needs --zero 0 or 1, stage 2 would reduce gradients too often")
    return problems


def _sequence_problems(settings: EngineSettings) -> list[str]:
    if settings.sp_mode is None:
        return [f"--sp {settings.sp_size} needs --enable_sequence_parallelism"] if settings.sp_size > 1 else []
    problems = []
    if settings.sp_mode == "all_to_all" and settings.sp_size == 1:
        problems.append("--sp_mode all_to_all needs --sp, the number of ranks that share a sample")
    if settings.sp_mode != "all_to_all" and settings.tp_size == 1:
        problems.append(f"--sp_mode {settings.sp_mode} needs --tp, whose ranks share a sample")
    if settings.sp_mode != "all_to_all" and settings.sp_size > 1:
        problems.append(f"--sp is for --sp_mode all_to_all, {settings.sp_mode} uses the ranks of --tp; leave it out")
    if settings.sp_mode != "all_to_all" and settings.zero_stage == 2 and settings.accumulation_steps > 1:
        problems.append(
            f"--sp_mode {settings.sp_mode} with --accumulation_steps {settings.accumulation_steps} needs --zero 0 or "
            f"1, since stage 2 cannot wait for the last micro batch"
        )
    return problems
