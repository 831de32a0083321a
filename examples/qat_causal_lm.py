"""From a trained language model to one of few bits, in every format that holds it.

    python -m examples.qat_causal_lm --model FOLDER --data FILES_OR_FOLDERS --bits 2

The matrices of the blocks are trained with `--bits` (0 is ternary), embeddings and the head with
`--embedding-bits`, from the weights of the model, which is a name or a folder of transformers. The
text is cut into sequences of `--context` tokens that fill them; one document in ten is for the
test. At the end stand, in a folder for each number of bits, the packed weights, a folder for
transformers, torchao's tensors and a GGUF file, or the reason why there is none.

Without `--model` a small model is trained first, of bytes or of `--from-config`, and without
`--data` on the sources of Python's standard library, so that

    python -m examples.qat_causal_lm

needs no data and no network. It trains a model of 0.9 million parameters, goes on from there in
full precision and in 4, 2, ternary and 1 bits by as many steps, writes a few lines with the packed
model, and prints a table.

A run that was told to stop (SIGTERM, Ctrl-C) saves a checkpoint and ends with the status 143; the
same command with `--resume` goes on bit for bit. On several processes:

    torchrun --nproc-per-node 2 -m examples.qat_causal_lm --parallel fsdp2 ...
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.language import artefacts, notes
from examples.language.checks import check, continued
from examples.language.models import of_bytes, tokenizer_of, trained, untrained
from examples.language.quantization import FULL
from examples.language.scores import Score, score
from examples.language.stage import Stage
from examples.language.text import Documents, Text, standard_library, text_of, windows
from examples.options import at_least, name_of_bits
from examples.recipe.parallel import MODES, World, status_of, whole
from examples.recipe.stopping import STATUS_STOPPED, Stopped, stop_on_signals
from parq_fn import coverage, export
from parq_fn.foundation.command import Parser, UserError, command, output_folder

PROGRAM = "qat_causal_lm"
START, RESULT, FLAGS = "start", "result.json", "flags.json"
#: Flags that may change where a run is taken up.
_FREE = (
    *("save_dir", "resume", "save_every", "eval_every", "no_progress", "parallel", "prompt"),
    *("new_tokens", "bits", "torch_compile", "gradient_checkpointing"),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked. What is wrong ends the program with one line."""
    parser = Parser(f"examples.{PROGRAM}", __doc__)
    group: Any = parser

    def flag(name: str, default: Any, text: str, shown: str | None = None, **options: Any) -> None:
        told = f"{text} (default: {default if shown is None else shown})"
        group.add_argument(name, default=default, help=told.replace("%", "%%"), **options)

    def switch(name: str, text: str) -> None:
        group.add_argument(name, action="store_true", help=text)

    count, number, share = ({"type": at_least(*a)} for a in ((1, int), (0,), (0,)))
    own = range(0, 9)

    group = parser.add_argument_group("model and text")
    flag("--model", None, "name or folder of a trained model", "none: one is trained first")
    flag("--from-config", None, "file or folder of the configuration of a model to train first",
         "a Llama of bytes", metavar="PATH")  # fmt: skip
    flag("--tokenizer", None, "name or folder of the tokenizer", "the model's")
    flag("--width", 128, "features of the model of bytes, a multiple of 32", type=at_least(32, int))
    flag("--layers", 4, "blocks of the model of bytes", **count)
    flag("--data", None, "files of text, folders of them, or folders that datasets has saved",
         "Python's standard library", nargs="+", type=Path, metavar="PATH")  # fmt: skip
    flag("--test-data", None, "the same, for the test", "one document in ten of --data", nargs="+",
         type=Path, metavar="PATH")  # fmt: skip
    flag("--text-column", "text", "name of the text in folders of datasets and in lines of JSON")
    flag("--context", 128, "tokens of a sequence", **count)

    group = parser.add_argument_group("quantization")
    flag("--bits", None, "bits of a weight, one training for each: 0 (ternary) to 8, or 16, which "
         "goes on in full precision", "2, and without --model 16 4 2 0 1", nargs="+", type=int,
         choices=[*own, FULL], metavar="BITS")  # fmt: skip
    flag("--embedding-bits", 4, "bits of embeddings and of the head, 0 to 8, or 16", type=int,
         choices=[*own, FULL], metavar="BITS")  # fmt: skip
    flag("--block-size", 64, "weights that have a scale in common; 0 for all of a row", "64",
         type=at_least(0, int))  # fmt: skip
    flag("--anneal-start", 0.1, "share of the steps after which annealing starts", **share)
    flag("--anneal-end", 0.8, "share of the steps after which it has ended", **share)
    flag("--distill", 0.0, "share of the loss that is the distance from the predictions of the "
         "model that training starts from", **share)  # fmt: skip

    group = parser.add_argument_group("training")
    flag("--steps", 200, "steps of each training", type=at_least(5, int))
    flag("--start-steps", None, "steps of the training of a model that is trained first",
         "twice --steps", **count)  # fmt: skip
    flag("--batch-size", 16, "sequences of a step, over all processes", **count)
    flag("--lr", None, "highest learning rate of AdamW", "1e-3, and 1e-4 with --model", **number)
    flag("--start-lr", 3e-3, "that of a model that is trained first", **number)
    flag("--warmup", 0.05, "share of the steps in which the rate rises", **share)
    flag("--weight-decay", 0.1, "of matrices", **number)
    flag("--clip", 1.0, "largest norm of the gradients", **number)
    flag("--seed", 0, "of the order of sequences, and of random weights", type=at_least(0, int))
    switch("--amp", "bfloat16 in forward passes")
    switch("--torch-compile", "compile the model and the optimizer's pass")
    switch("--gradient-checkpointing", "make activations again in backward passes")
    flag("--parallel", None, "none, ddp or fsdp2", "ddp under torchrun", choices=MODES)

    group = parser.add_argument_group("what is written")
    flag("--save-dir", Path("runs/qat_causal_lm"), "folder of the run", type=Path)
    flag("--save-every", 100, "steps between checkpoints", **count)
    flag("--eval-every", 100, "steps between tests", **count)
    flag("--eval-tokens", 32768, "tokens of the test text, at most", **count)
    flag("--prompt", "def ", "what the packed model goes on from")
    flag("--new-tokens", 120, "tokens that it adds, at most", type=at_least(0, int))
    switch("--resume", "go on with the run of --save-dir")
    switch("--no-progress", "without progress bars")
    args = parser.parse_args(argv)
    _check(parser, args)
    return args


def _check(parser: Any, args: argparse.Namespace) -> None:
    if args.model is not None and args.from_config is not None:
        parser.error("--model is trained already; leave --from-config out, or --model")
    if args.from_config is not None and args.tokenizer is None and Path(args.from_config).is_file():
        parser.error("--from-config is a file, which has no tokenizer; give --tokenizer")
    if args.from_config is not None and not Path(args.from_config).exists():
        parser.error(f"--from-config: there is no {args.from_config}")
    if args.width % 32:
        parser.error(f"--width must be a multiple of 32, got {args.width}")
    for name in ("distill", "warmup", "anneal_start", "anneal_end"):
        if (got := getattr(args, name)) > 1:
            parser.error(f"--{name.replace('_', '-')} is a share, at most 1, got {got}")
    if args.anneal_start >= args.anneal_end:
        parser.error("--anneal-start must lie before --anneal-end")
    if args.bits is None:
        args.bits = [2] if args.model is not None else [FULL, 4, 2, 0, 1]
    args.bits = list(dict.fromkeys(args.bits))
    if args.start_steps is None:
        args.start_steps = 2 * args.steps
    if args.lr is None:
        args.lr = 1e-3 if args.model is None else 1e-4
    output_folder(args.save_dir)


class Run:
    """All trainings of a run, one after another."""

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world = args, world
        self.stopping = False  # whether a signal has told it to stop
        if args.batch_size % world.size:
            raise UserError(
                f"--batch-size {args.batch_size} has to be a multiple of {world.size} processes"
            )
        world.in_turn(self._check_flags)
        self.tokenizer = world.in_turn(
            lambda: tokenizer_of(args.tokenizer or args.model or args.from_config)
        )
        world.in_turn(lambda: check(self._first(), args, self.tokenizer))
        self.text: Text = world.in_turn(self._text)
        few = min(windows(self.text.train, args.context), windows(self.text.test, args.context))
        if not few:
            raise UserError(
                f"--data has {len(self.text.train):,} tokens and {len(self.text.test):,} for the "
                f"test, less than a sequence of {args.context}; give more, or a smaller --context"
            )
        if world.first:
            notes.write(args.save_dir / FLAGS, self.flags)

    def run(self) -> None:
        """Trains what is not trained yet, and prints the table."""
        args, text = self.args, self.text
        left = ", ".join(f"{n} of {ending}" for ending, n in sorted(text.left_out.items()))
        self.say(
            f"text: {text.documents:,} documents, {len(text.train):,} tokens and "
            f"{len(text.test):,} for the test, {text.bytes_per_token:.2f} bytes a token"
            + (f"; files left out: {left}" if left else "")
            + (f"; documents not in UTF-8, patched: {text.patched:,}" if text.patched else "")
        )
        if args.model is None:
            self._train_start()
        first = self._start_score()
        rows = [self._row("start", first, {})]
        for bits in args.bits:
            found = self._train_bits(bits)
            rows.append(self._row(name_of(bits), Score(*found["score"]), found))
        if self.world.first:
            print(table(rows))

    # What a run starts from.

    @property
    def start(self) -> str:
        """The model that all trainings start from: a name or a folder."""
        return str(self.args.model or self.args.save_dir / START)

    @property
    def flags(self) -> dict[str, Any]:
        """The flags that a run keeps to."""
        told = {k: v for k, v in vars(self.args).items() if k not in _FREE}
        kept: dict[str, Any] = json.loads(json.dumps(told, default=str))
        return kept

    def _check_flags(self) -> bool:
        """Compares the flags with those of the run that is taken up, if there is one."""
        args, file = self.args, self.args.save_dir / FLAGS
        if not file.exists():
            return True
        if not args.resume:
            raise UserError(f"{args.save_dir} has a run; give --resume, or another --save-dir")
        before = notes.read(file)
        for name, got in self.flags.items():
            if before.get(name) != got:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{args.save_dir} was begun with {flag} {before.get(name)}, and this run has "
                    f"{got}; give the same, or another --save-dir"
                )
        return True

    def _text(self) -> Text:
        args = self.args
        column, own = args.text_column, args.save_dir
        documents = Documents(args.data or standard_library(), column, without=own)
        tests = args.test_data and Documents(args.test_data, column, "--test-data", own)

        def bar(texts: Iterable[str], what: str) -> Iterable[str]:
            hidden = True if args.no_progress or not self.world.first else None
            return tqdm(texts, what, unit=" documents", disable=hidden, leave=False)

        return text_of(documents, tests, self.tokenizer, args.save_dir / "tokens", bar)

    def _train_start(self) -> None:
        """Trains a model with random weights, and saves it as transformers does."""
        args, folder = self.args, self.args.save_dir / START
        if (folder / RESULT).exists():
            return
        stage = Stage(
            *("start, full precision", folder, self._first(), FULL, self.text, args, self.world),
            stopping=lambda: self.stopping,
            rate=args.start_lr,
            steps=args.start_steps,
        )
        found = stage.train()
        self._save_whole(stage, folder)
        self._keep(folder, {"score": found, "seconds": stage.seconds})

    def _first(self) -> Any:
        """The model that the run begins with, anew: the trained one, or one with random weights."""
        args = self.args
        if args.model is not None:
            return trained(args.model)
        if args.from_config is not None:
            return untrained(args.from_config, args.seed)
        return of_bytes(args.width, args.layers, args.context, self.tokenizer, args.seed)

    def _start_score(self) -> Score:
        model = self._model().to(self.world.device)
        return score(model, self.text, self.args, self.world, self._raise_if_stopping)

    def _model(self) -> Any:
        """The model that trainings start from, anew."""
        return self.world.in_turn(lambda: trained(self.start))

    # Trainings.

    def _train_bits(self, bits: int) -> dict[str, Any]:
        """What a training of so many bits comes to."""
        args, folder = self.args, self.args.save_dir / name_of(bits)
        if (folder / RESULT).exists():
            return notes.read(folder / RESULT)
        teacher = self._model() if args.distill else None
        stage = Stage(
            *(name_of(bits), folder, self._model(), bits, self.text, args, self.world),
            stopping=lambda: self.stopping,
            rate=args.lr,
            steps=args.steps,
            teacher=teacher,
        )
        result: dict[str, Any] = {"score": stage.train(), "seconds": stage.seconds}
        if stage.quantized is None:
            self._save_whole(stage, folder / artefacts.FOLDER)
        else:
            result |= self._artefacts(stage, folder)
        self._keep(folder, result)
        return result

    def _artefacts(self, stage: Stage, folder: Path) -> dict[str, Any]:
        """Writes the quantized model in every format; what it comes to."""
        covered = coverage(stage.net, stage.quantized)
        packed = export.pack(stage.net, stage.quantized, snap=True)
        told: dict[str, str] = {}
        if self.world.first:
            model, told = artefacts.write(
                folder, packed, lambda: trained(self.start), self.tokenizer
            )
            for name, about in told.items():
                self.say(f"{folder / name}: {about}")
            if model is not None and self.args.new_tokens:
                self.say(f"{folder.name} writes:\n{continued(model, self.args, self.tokenizer)}")
        hard = self._model()
        export.load_into(hard, packed)
        found = score(
            hard.to(self.world.device), self.text, self.args, self.world, self._raise_if_stopping
        )
        size = (folder / artefacts.PACKED).stat().st_size if self.world.first else 0
        return {"score": found, "share": covered.share, "bytes": size, "artefacts": told}

    def _save_whole(self, stage: Stage, folder: Path) -> None:
        """The weights in full precision, as transformers keeps them."""
        weights = {name: whole(t) for name, t in stage.net.state_dict().items()}
        if self.world.first:
            stage.net.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)
        self.world.any(False)  # they are there

    def _keep(self, folder: Path, result: dict[str, Any]) -> None:
        """Says that a training is done, whose checkpoint is not needed any more."""
        if self.world.first:
            notes.write(folder / RESULT, result)
            shutil.rmtree(folder / "last", ignore_errors=True)
        self.world.any(False)

    def _raise_if_stopping(self) -> None:
        if self.world.any(self.stopping):
            raise Stopped

    def say(self, text: str) -> None:
        if self.world.first:
            tqdm.write(text)

    def _row(self, name: str, found: Score, about: dict[str, Any]) -> list[str]:
        size, share = about.get("bytes"), about.get("share")
        return [
            name,
            f"{found.bits_per_byte:.4f}",
            f"{found.perplexity:.3f}",
            "" if share is None else f"{100 * share:.1f} %",
            "" if not size else f"{size:,}",
            f"{about.get('seconds', 0.0):.0f}" if about else "",
        ]


HEADS = ["weights", "bits a byte", "perplexity", "quantized", "bytes", "seconds"]


def table(rows: list[list[str]]) -> str:
    """As Markdown."""
    lines = [HEADS, ["---"] * len(HEADS), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def name_of(bits: int) -> str:
    """What a training is called, and its folder.

    >>> name_of(16), name_of(2), name_of(0)
    ('full precision', '2 bits', 'ternary')
    """
    return "full precision" if bits == FULL else name_of_bits(bits)


def execute(args: argparse.Namespace, world: World) -> int:
    """The whole run; the program's status."""
    run = Run(args, world)
    with stop_on_signals(run):
        try:
            run.run()
        except Stopped:
            run.say("stopped; --resume goes on")
            return STATUS_STOPPED
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and writes; the status that the program ends with: 0, 2 for what the user can put
    right, 143 for a run that was told to stop."""
    args = parse(argv)
    return status_of(args.parallel, PROGRAM, lambda world: execute(args, world))


if __name__ == "__main__":
    command(main)
