"""What each command of ``skd-jax`` takes, and does; ``cli.py`` runs them.

JAX is imported when a command begins to work, so that help is there at once.
"""

import argparse
import ast
import contextlib
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from skd_jax.errors import UserError, complain, told
from skd_jax.files import whole
from skd_jax.output import (
    FORMATS,
    destination,
    listed,
    printable,
    write_evaluation,
    write_predictions,
)

if TYPE_CHECKING:
    from skd_jax.model import Model

Commands = Any  # what ``add_subparsers`` returns; argparse has no public name for it
WIDTH = 80  # of help, characters


def add_all(commands: Commands) -> None:
    """Adds every command, in the order that help shows them in."""
    for add in (_add_extend, _add_predict, _add_evaluate, _add_sample, _add_export, _add_train):
        add(commands)


def _add_command(
    commands: Commands, name: str, work: Callable[..., int], summary: str, more: str, example: str
) -> argparse.ArgumentParser:
    """Adds a command that does ``work(options)``; its help ends in an example.

    Of ``more``, paragraphs are wrapped and indented lines stay as they are.
    """
    paragraphs = [f"{summary[0].upper()}{summary[1:]}.", *more.split("\n\n")]
    wrapped = [p if p.startswith(" ") else textwrap.fill(p, WIDTH) for p in paragraphs]
    parser = commands.add_parser(
        name, help=summary, description="\n\n".join(wrapped), epilog=f"example:\n  {example}"
    )
    parser.set_defaults(work=work)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--model`` and what a file of bare weights cannot say; see :func:`_load_model`."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        required=True,
        help="a model folder, a .safetensors or .npz file, or the workdir of a run",
    )
    group = parser.add_argument_group(
        "what a .safetensors file alone cannot say (a model folder can)"
    )
    group.add_argument("--classes", metavar="FILE", help="class names, one a line")
    colours = {"type": _numbers, "metavar": "R,G,B"}
    group.add_argument("--mean", **colours, help="of the training images, in [0, 1]")
    group.add_argument("--std", **colours, help="of the training images, in [0, 1]")
    pixels = {"type": _positive, "metavar": "PIXELS"}
    group.add_argument("--image-size", **pixels, help="side of the images that the network takes")
    group.add_argument(
        "--load-size", **pixels, help="side that images are resized to before the centre is cut out"
    )
    group.add_argument(
        "--fit",
        choices=("squash", "crop"),
        help="how an image becomes a square: resized, or its short side resized and the rest cut",
    )
    group.add_argument(
        "--last-relu",
        action=argparse.BooleanOptionalAction,
        help="whether the last block ends in a ReLU",
    )


def _load_model(options: argparse.Namespace) -> "Model":
    """The model that the flags of :func:`_add_model_flags` name.

    Raises:
      UserError: it cannot be read, or something has to be given.
    """
    from skd_jax.compiler import keep_compiled
    from skd_jax.model import load

    keep_compiled()
    return load(
        options.model,
        classes=options.classes,
        mean=options.mean,
        std=options.std,
        image_size=options.image_size,
        load_size=options.load_size,
        fit=options.fit,
        last_relu=options.last_relu,
    )


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=FORMATS, default=FORMATS[0], help="of the output; default: table"
    )
    parser.add_argument("--output", metavar="FILE", help="write to this file; default: print")


def _whole_number(text: str, numbers: range, said: str) -> int:
    short = text.isdecimal() and text.isascii() and len(text) <= len(str(numbers[-1]))
    if not (short and int(text) in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {said}")
    return int(text)


def _positive(text: str) -> int:
    return _whole_number(text, range(1, 10**9), "of 1 or more")


def _seed(text: str) -> int:
    return _whole_number(text, range(2**32), "from 0 to 2**32 - 1")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not numbers with commas between, such as 0.49,0.48,0.45"
        ) from None


class _Broken:
    """Says which images cannot be read, and remembers that some could not."""

    code = 0

    def __call__(self, error: UserError) -> None:
        self.code = 2
        complain(told(error))


def _add_train(commands: Commands) -> None:
    parser = _add_command(
        commands,
        "train",
        _help_of_training,
        "train by a config, base classes first, then task by task",
        "The workdir gets summary.json, pictures, a log and checkpoints. If it is interrupted, "
        "the same command goes on from the newest checkpoint. python -m skd_jax.main does the "
        "same.",
        "skd-jax train --config=configs/digits.py:method=lwf --workdir=runs/lwf \\\n"
        "      --config.base.epochs=20",
    )
    parser.add_argument(
        "--config",
        metavar="FILE[:NAME=VALUE,...]",
        help="a config file with its arguments, such as configs/cifar100.py:tasks=10; those that "
        "come with the package need not be there",
    )
    parser.add_argument(
        "--config.SECTION.FIELD",
        metavar="VALUE",
        help="set a field of it; skd_jax/config.py and each method's Settings say what each is",
    )
    parser.add_argument("--workdir", metavar="DIR", help="where the run writes, and goes on from")
    group = parser.add_argument_group("several processes, on one machine or many")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="this is one of them; TPU pods, Slurm, Kubernetes and Open MPI say which, elsewhere "
        "the next three flags do",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--processes", metavar="N", help="how many there are")
    group.add_argument("--process", metavar="I", help="which this is, from 0")
    group.add_argument(
        "--peer_timeout",
        metavar="SECONDS",
        help="all end when one gives no sign of life for so long; default: 100",
    )


def _help_of_training(options: argparse.Namespace) -> NoReturn:
    raise AssertionError("cli.run() hands the command line to skd_jax.main")


def _add_extend(commands: Commands) -> None:
    parser = _add_command(
        commands,
        "extend",
        _extend,
        "teach a model new classes, without images of the old ones",
        "A delegator is trained from the model alone; it replays the old classes while the\n"
        "new ones are learned. The folder gets a model that knows both (model.safetensors,\n"
        "with the names that it came with), a report (report.html) and the run. If it is\n"
        "interrupted, the same command goes on.",
        "skd-jax extend --model=old.safetensors --classes=old_labels.txt \\\n"
        "      --mean=0.49,0.48,0.45 --std=0.25,0.24,0.26 --image-size=32 \\\n"
        "      --images=new_images/ --out=new_model/",
    )
    parser.add_argument(
        "--images", required=True, metavar="FOLDER", help="a sub-folder of images a new class"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument(
        "--check",
        metavar="FOLDER",
        help="a sub-folder a class with images of old classes, to measure what is kept of them",
    )
    parser.add_argument(
        "--method",
        default="skd",
        metavar="NAME",
        help="skd (default); or, to compare, pseudo_ncm (nothing but the delegator is trained), "
        "finetune or lwf",
    )
    parser.add_argument("--batch", type=_positive, metavar="N", help="new images a step")
    parser.add_argument(
        "--effort", type=_number, default=1.0, metavar="X", help="0.1 trains a tenth as long"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of all random numbers; default: 0")
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="whether a mirrored image shows the same class; default: it does",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another setting, such as method.stage_two.balanced=1.0; the report lists all",
    )
    _add_model_flags(parser)


def _extend(options: argparse.Namespace) -> int:
    from skd_jax.extending import check_free, extend

    changes = dict(map(_setting, options.set))
    check_free(options.out)
    extend(
        _load_model(options),
        options.images,
        options.out,
        check=options.check,
        method=options.method,
        batch=options.batch,
        effort=options.effort,
        seed=options.seed,
        flip=options.flip,
        changes=changes,
    )
    return 0


def _setting(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    try:
        return name.removeprefix("config."), ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if given and name and value.isidentifier():  # a word needs no quotes
            return name.removeprefix("config."), value
        raise UserError(
            f"--set={text}: give FIELD=VALUE, such as method.stage_two.balanced=1.0"
        ) from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _add_predict(commands: Commands) -> None:
    parser = _add_command(
        commands,
        "predict",
        _predict,
        "say what is on images",
        "Of a folder, all images in it and its sub-folders are read. An image that cannot "
        "be read is named on standard error and left out; the exit code is 2 then.",
        "skd-jax predict --model=new_model/ photo.jpg holiday/ --top=3",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image, or a folder of them")
    parser.add_argument(
        "--top", type=_positive, default=1, metavar="K", help="name the K likeliest; default: 1"
    )
    _add_output_flags(parser)
    _add_model_flags(parser)


def _predict(options: argparse.Namespace) -> int:
    from skd_jax.predict import find_all, predictions

    model, broken = _load_model(options), _Broken()
    files = find_all(options.images)
    with destination(options.output) as out:
        found = predictions(model, files, options.top, broken)
        write_predictions(options.format, found, files, out)
    return broken.code


def _add_evaluate(commands: Commands) -> None:
    parser = _add_command(
        commands,
        "evaluate",
        _evaluate,
        "measure accuracy on a labelled folder",
        "The folder has one sub-folder of images a class, named like the model's class. "
        "Classes of the model that have no images there are left out.",
        "skd-jax evaluate --model=new_model/ --images=test/ --confusion=confusion.png",
    )
    parser.add_argument("--images", required=True, metavar="FOLDER", help="the labelled folder")
    parser.add_argument(
        "--confusion", metavar="FILE", help="draw the confusion matrix into this PNG file"
    )
    _add_output_flags(parser)
    _add_model_flags(parser)


def _evaluate(options: argparse.Namespace) -> int:
    if options.confusion and not options.confusion.lower().endswith(".png"):
        raise UserError(f"--confusion={options.confusion}: name a file that ends in .png")
    from skd_jax import confusion, plots

    model, broken = _load_model(options), _Broken()
    with contextlib.ExitStack() as files:
        out = files.enter_context(destination(options.output))
        picture = options.confusion and files.enter_context(whole(options.confusion, mode="wb"))
        found = confusion.evaluate(model, options.images, broken)
        write_evaluation(options.format, found, out)
        if picture:
            plots.confusion(found.confusion, found.class_names, picture)
    return broken.code


def _add_sample(commands: Commands) -> None:
    parser = _add_command(
        commands,
        "sample",
        _sample,
        "draw pseudo images of the classes",
        "The model's delegator draws; an image's class is the one that the model gives "
        "it. The folder gets a sub-folder of PNG files a class, and samples.png, a picture "
        "of all classes or, if there are more than 20, of the 20 that are drawn most.",
        "skd-jax sample --model=new_model/ --out=samples/ --per-class=5",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    number = {"type": _positive, "metavar": "N"}
    parser.add_argument("--per-class", **number, default=10, help="images; default: 10")
    parser.add_argument(
        "--draws",
        **number,
        help="draw at most so many in all; default: 10 times what is wanted, at least 1000",
    )
    parser.add_argument(
        "--seed", type=_seed, default=0, help="another one draws others; default: 0"
    )
    _add_model_flags(parser)


def _sample(options: argparse.Namespace) -> int:
    from skd_jax import sample

    sample.check_folder(options.out)
    model = _load_model(options)
    samples = sample.sample(model, options.per_class, options.seed, options.draws)
    sample.write_samples(model, samples, options.out)
    total, names = int(samples.drawn.sum()), model.class_names
    with destination(None) as out:
        out.write(
            f"{len(samples.labels)} images written (of {total} drawn): {printable(options.out)}\n"
        )
    few = {name: int(n) for name, n in zip(names, samples.drawn, strict=True)}
    if never := [name for name, n in few.items() if not n]:
        complain(f"warning: never drawn in {total} draws: {listed(never)}; --draws=N draws more")
    if rare := [f"{name} ({n})" for name, n in few.items() if 0 < n < options.per_class]:
        complain(f"warning: drawn less often than {options.per_class} times: {listed(rare)}")
    return 0


def _add_export(commands: Commands) -> None:
    parser = _add_command(
        commands,
        "export",
        _export,
        "write one file that JAX runs without this package",
        "The file holds the weights and the preprocessing: uint8 images [n, side, side, "
        "channels] go in, float32 scores [n, classes] come out, on CPUs, GPUs and TPUs. "
        "The class names are written beside it, as labels.txt. It takes jax and "
        "flatbuffers to run:\n\n"
        '  exported = jax.export.deserialize(bytearray(open(FILE, "rb").read()))\n'
        "  scores = exported.call(images)",
        "skd-jax export --model=new_model/ --out=model.stablehlo",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="a new file")
    _add_model_flags(parser)


def _export(options: argparse.Namespace) -> int:
    from skd_jax import export

    export.check_free(options.out)
    labels = export.write_export(_load_model(options), options.out)
    with destination(None) as out:
        out.write(f"written: {printable(options.out)} and {printable(str(labels))}\n")
    return 0
