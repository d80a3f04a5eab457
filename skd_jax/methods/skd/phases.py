"""SKD, Algorithm 1: train the delegator from T_n alone, then learn task n + 1 beside its replay.

With ``config.method.stage_two.delegator`` off, stage one is skipped and the rest stays as it is:
the "w/o SKD" rows of Table III.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from skd_jax import steps
from skd_jax.config import Config, Data
from skd_jax.errors import UserError
from skd_jax.losses import adaptive_loss_weight
from skd_jax.methods import phases as shared
from skd_jax.methods.phase import Method, Metrics, Phase, Setting
from skd_jax.methods.skd import new_outputs, quality, terms
from skd_jax.methods.skd.settings import Settings, StageOne, StageTwo, check
from skd_jax.methods.skd.steps import Networks, StageOneState, adam, cil, round_, with_delegator
from skd_jax.models import Delegator, align_head
from skd_jax.state import Batch, Kept, Network, Trained

DELEGATOR = 1  # stage one's number in its random keys


@struct.dataclass
class KeptDelegator(Kept):
    """T_n, and D_n, or D_{n-1} until stage one of task n has ended; None before the first.

    ``later_means`` are the mean features of real images of the classes that tasks have learned,
    float32 [K - K_0, F], of each in the features of its task; None where none are kept.
    """

    delegator: Network | None = None
    later_means: jax.Array | None = None


def delegator_module(config: Config) -> Delegator:
    """The architecture of D_n that a configuration names."""
    section, model, data = config.method.delegator, config.model, config.data
    return Delegator(
        image_size=data.image_size,
        channels=data.channels,
        widths=section.widths,
        upsample=section.upsample,
        helper_bn=section.helper_bn,
        z_dim=section.z_dim,
        bn_momentum=model.bn_momentum,
        dtype=model.dtype,
        precision=model.precision,
    )


def networks(config: Config) -> Networks:
    """The architectures of T_n, S_n and D_n that a configuration names.

    Raises:
      UserError: it is another method's.
    """
    if not hasattr(config.method, "delegator"):
        raise UserError(
            f"config.method.name: {config.method.name!r} has no delegator; this needs skd"
        )
    return Networks(steps.networks(config.model).features, delegator_module(config))


def phases(setting: Setting, task: int) -> list[Phase]:
    """Stage one of T_{n-1} and stage two of task n."""
    if not task:
        return []
    two = setting.config.method.stage_two
    found = [stage_one(setting, task - 1)] if two.delegator else []
    found.append(stage_two(setting, task))
    if two.new_outputs_decay:
        found.append(new_outputs.phase(setting, task, delegator_module(setting.config)))
    return found


def stage_one_rounds(config: StageOne, task: int) -> tuple[int, range]:
    """(number of rounds, epochs after which the rates drop) of stage one of task n."""
    epochs = config.finetune_epochs if task else config.epochs
    every = config.finetune_drop_every if task else config.drop_every
    return epochs * config.rounds_per_epoch, range(every, epochs, every)


@dataclasses.dataclass(frozen=True)
class _Rounds:
    """What a round depends on that is no array."""

    config: StageOne
    delegator: Delegator
    terms: tuple[tuple[str, terms.Term], ...]
    data: Data | None  # how D_n's images are changed; None: not at all


def _round(
    static: _Rounds,
    nets: steps.Networks,
    state: StageOneState,
    kept: KeptDelegator,
    batch: Batch | None,
    key: jax.Array,
    rates: dict[str, Any],
) -> tuple[StageOneState, Metrics]:
    del batch  # stage one sees no image at all
    assert kept.classifier is not None
    return round_(
        with_delegator(nets, static.delegator),
        static.config,
        static.terms,
        state,
        kept.classifier,
        key,
        rates["weights"],
        rates["student"],
        rates["delegator"],
        static.data,
    )


def _altered(config: Config) -> Data | None:
    """What says how images that D_n draws are changed; None: not at all."""
    return config.data if config.method.stage_one.augment else None


def stage_one(setting: Setting, task: int) -> Phase:
    """Trains D_n and S_n from T_n alone (Eq. 1-8)."""
    config, one = setting.config, setting.config.method.stage_one
    nets = Networks(setting.nets.features, delegator_module(config))
    init_key, _ = setting.keys(task, DELEGATOR)
    rounds, drop_epochs = stage_one_rounds(one, task)
    functions = terms.lookup(one)
    weights = {name: dict(one.terms)[name] for name, _ in functions}
    data = config.data

    def init(kept: KeptDelegator) -> StageOneState:
        student_key, delegator_key = jax.random.split(init_key)
        shape = (1, data.image_size, data.image_size, data.channels)
        student = steps.initial(nets.features, student_key, shape)
        if kept.delegator is None:  # D_0
            shape = (1, nets.delegator.z_dim)
            delegator = steps.initial(nets.delegator, delegator_key, shape)
        else:  # D_n starts as D_{n-1}; a copy, since the state is donated
            delegator = jax.tree.map(jnp.copy, kept.delegator)
        return StageOneState(
            Trained(student, steps.sgd(one).init(student.params)),
            Trained(delegator, adam().init(delegator.params)),
        )

    def explored() -> terms.Explored:
        """The shapes of what the terms are given."""
        image = (data.image_size, data.image_size, data.channels)
        network = jax.eval_shape(lambda: steps.initial(nets.features, init_key, (1, *image)))

        def floats(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        moments = steps.moments(network.batch_stats)
        features = floats(one.batch, nets.features.num_features)
        logits = floats(one.batch, sum(setting.classes[: task + 1]))
        of_networks = (features, logits, features, logits, moments, moments, moments)
        return terms.Explored(floats(one.batch, *image), *of_networks, config=one)

    def rates(numbers: np.ndarray) -> dict[str, Any]:
        def of(rate: float, *cosines: str) -> np.ndarray:
            if one.schedule in cosines:
                return steps.half_cosine(rate, numbers, rounds)
            return steps.dropped(rate, numbers // one.rounds_per_epoch, drop_epochs)

        return {
            "weights": {n: np.full(len(numbers), w, np.float32) for n, w in weights.items()},
            "student": of(one.student_lr, "cosine", "student_cosine"),
            "delegator": of(one.delegator_lr, "cosine"),
        }

    def finish(state: StageOneState, kept: KeptDelegator, take: Callable) -> KeptDelegator:
        del take
        return dataclasses.replace(kept, delegator=state.delegator.network)

    return Phase(
        name="delegator",
        task=task,
        number=DELEGATOR,
        steps=rounds,
        batch=one.batch,
        field="method.stage_one.batch",
        reads="nothing",
        static=_Rounds(one, nets.delegator, functions, _altered(config)),
        init=init,
        step=_round,
        rates=rates,
        finish=finish,
        unit="round",
        report=partial(quality.examine, nets, task),
        watch=partial(quality.watch, config.run.collapse_share, "stage_one.terms.diversity"),
        shown=("imitation", "explore", "label_entropy"),
        passes=one.batch * (5 * one.imitate_steps + 9),  # D, T_n and S_n; and back
        try_out=partial(terms.try_out, functions, explored),
    )


@dataclasses.dataclass(frozen=True)
class _Learning:
    """What a CIL step depends on that is no array."""

    config: StageTwo
    delegator: Delegator
    data: Data | None  # how D_n's images are changed; None: not at all


def _cil(
    static: _Learning,
    nets: steps.Networks,
    state: Trained,
    kept: KeptDelegator,
    batch: Batch,
    key: jax.Array,
    rates: dict[str, jax.Array],
) -> tuple[Trained, Metrics]:
    assert kept.classifier is not None
    return cil(
        with_delegator(nets, static.delegator),
        static.config,
        state,
        kept.classifier,
        kept.delegator if static.config.delegator else None,
        batch.images,
        batch.labels,
        key,
        rates["gamma"],
        rates["rate"],
        static.data,
    )


def stage_two(setting: Setting, task: int, delegator: Delegator | None = None) -> Phase:
    """T_n learns its classes beside what D_{n-1} draws (Eq. 9-12).

    Args:
      setting: of the run.
      task: its number, 1 or more.
      delegator: for analyses, another architecture than the configuration's.
    """
    two, classes = setting.config.method.stage_two, setting.classes
    gamma = two.gamma
    if two.adaptive:
        beta = two.beta or 0.1 * sum(classes[1:])
        gamma = adaptive_loss_weight(beta, len(classes) - 1, classes[1 : task + 1])
    steps_per_epoch = setting.images[task] // two.batch

    def rates(numbers: np.ndarray) -> dict[str, np.ndarray]:
        epochs = numbers // steps_per_epoch
        return {
            "gamma": np.full(len(numbers), gamma, np.float32),
            "rate": steps.dropped(two.lr, epochs, two.drop_epochs),
        }

    def finish(state: Trained, kept: KeptDelegator, take: Callable) -> KeptDelegator:
        del take
        network = state.network
        if two.align_head:
            params = align_head(network.params, sum(classes[:task]))
            network = dataclasses.replace(network, params=params)
        return dataclasses.replace(kept, classifier=network)

    module = delegator or delegator_module(setting.config)
    static = _Learning(two, module, _altered(setting.config))
    field = "method.stage_two.batch"
    drawn = 5 * setting.config.method.stage_one.batch if two.delegator else 0
    more = {"shown": ("cil", "classification", "consolidation"), "passes": 4 * two.batch + drawn}
    more |= {"draws": True, "ends_task": not two.new_outputs_decay}
    return shared.learn(setting, task, two, _cil, static, field, rates=rates, finish=finish, **more)


def title(settings: Settings) -> str:
    """The method's name in the summary."""
    return "skd" if settings.stage_two.delegator else "skd without delegator"


def depends(settings: dict[str, Any], done: frozenset[str]) -> dict[str, Any]:
    """What of the settings the phases of these names depend on."""
    if "learn" in done:
        return settings
    if "delegator" not in done:
        return {}
    finetuning = ("finetune_epochs", "finetune_drop_every")
    one = {name: x for name, x in settings["stage_one"].items() if name not in finetuning}
    two = {"delegator": settings["stage_two"]["delegator"]}
    return {**settings, "stage_one": one, "stage_two": two}


def depends_with_d_0(settings: dict[str, Any], done: frozenset[str]) -> dict[str, Any]:
    """What of another method's settings its phases depend on, where the first is SKD's D_0.

    D_0 alone depends on what SKD's does, in the form of :func:`depends`, so that such a run can
    begin from one in which SKD has trained it.
    """
    if done - {"delegator"}:
        return settings
    parts = {"delegator": settings["delegator"], "stage_one": settings["stage_one"]}
    return depends({"name": "skd", **parts, "stage_two": {"delegator": True}}, done)


def describe(reports: Mapping[str, list]) -> str:
    """Table I's measure of each delegator, in percent."""
    rows = reports.get("delegator", ())
    lines = [f"{'delegator, %':<12}" + "".join(f"{x:>9}" for x in ("teacher", "student", "gap"))]
    for row in rows:
        numbers = (row["teacher_accuracy"], row["student_accuracy"], row["gap"])
        if None not in numbers:
            lines.append(f"of {row['task']:<9}" + "".join(f"{100 * x:>9.2f}" for x in numbers))
    return "\n".join(lines) if len(lines) > 1 else ""


METHOD = Method(
    "skd",
    Settings,
    phases,
    kept=KeptDelegator,
    check=check,
    title=title,
    depends=depends,
    describe=describe,
    remarks=quality.remarks,
    family="generator",
    keeps="the delegator",
)
