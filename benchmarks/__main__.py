"""The benchmarks' command: `python -m benchmarks merge`; each is a command of its own as well, `python -m benchmarks.merge`."""

from __future__ import annotations

from importlib import import_module

import typer

BENCHMARKS = {
    "merge": "Merge rounds of clients with unequal ranks, beside the dense form.",
    "fleet": "Many agents at one coordinator: waiting, picking up work, contributing.",
    "rounds": "Whole rounds when training takes no time, agents as real processes.",
    "chaos": "Kill processes and cut connections at random; nothing may be lost or counted twice.",
    "fuzz": "Feed damaged slices to their reader, guided by what they reach.",
}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Measure this machine.")


@app.callback()
def benchmarks() -> None:
    """Measure this machine. Close other programs first; every number is printed with the machine that it comes from."""


def _pass_on(context: typer.Context) -> None:
    module = import_module(f"benchmarks.{context.info_name}")
    typer.main.get_command(module.app).main(context.args, prog_name=f"python -m {module.__name__}", standalone_mode=False)


for name, sentence in BENCHMARKS.items():
    # Options are the module's own affair: importing it only now keeps the list of benchmarks quick.
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, help=sentence, context_settings=settings)(_pass_on)

if __name__ == "__main__":
    app()
