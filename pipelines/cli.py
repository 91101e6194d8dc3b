"""The command `voco`: one job file or one output per command; only `ask` has options that change what is done.

Exit codes: 0 done, 1 failed, 2 refused, 130 stopped; each of the last three says why in one line on stderr.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from voco.errors import Refused, exit_code
from voco.job import spec
from voco.store import storage

COMMANDS = {
    "plan": ("JOB", "check a job file; print stages, inputs, resources and sizes; run nothing"),
    "submit": ("JOB", "send it as a Ray job and follow it"),
    "run": ("JOB", "the driver, inside the cluster"),
    "status": ("RUN", "how a run is: a run id, a submission id or a job file"),
    "logs": ("RUN", "follow a run; Ctrl-C leaves it"),
    "stop": ("RUN", "end a run cleanly; sent again, it continues"),
    "show": ("OUTPUT", "one sample or row of an output made visible"),
    "render": ("JOB", "the same job for another runner: a KubeRay RayJob, to be applied with kubectl"),
    "ask": ("CHECKPOINT", "a question about images and videos: an answer, the time of both passes, whether the cache was hit"),
    "report": ("OUTPUT", "HTML with tables and plots from any output directory"),
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    asked = _parser().parse_args(arguments)
    return exit_code(lambda: _do(asked))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="voco", description="VoCo on Ray: one YAML file is one job")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (operand, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("operand", metavar=operand)
        if name == "ask":
            _add_ask(command)
        if name in ("submit", "run"):
            command.add_argument("--replace", action="store_true", help="overwrite an output that holds another run")
        if name == "render":
            command.add_argument("--kuberay", action="store_true", required=True, help="as a RayJob with its ConfigMap")
            command.add_argument("--image", help="container image with this package installed")
        if name in ("submit", "status", "logs", "stop"):
            command.add_argument("--address", help="of the Jobs API, http://HOST:8265")
    return parser


def _add_ask(command: argparse.ArgumentParser) -> None:
    command.add_argument("media", metavar="MEDIA", nargs="*", help="images and videos, on disk or s3://")
    command.add_argument("question", metavar="QUESTION")
    command.add_argument("--cache", metavar="URI", default="~/.cache/voco", help="where caches are kept (default: %(default)s)")
    command.add_argument("--no-cache", action="store_true", help="keep nothing and compress again")
    command.add_argument("--tokens", type=int, help="<voco> tokens read of each view: at most the checkpoint's N, its default")
    command.add_argument("--frames", type=int, default=8, help="frames of a video, evenly (default: %(default)s)")
    command.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    command.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this; may be repeated"
    )
    command.add_argument("--keep-system", action="store_true", help="keep the template's own text in the cache too; one medium")


def _do(asked: argparse.Namespace) -> int:
    if asked.command == "ask":
        return ask(asked)
    if asked.command == "plan":
        from voco.commands import plan

        job = spec.load_job(asked.operand)
        print("\n".join(plan.plan_lines(asked.operand, job)))
        return plan.plan_exit_code(asked.operand, job)
    if asked.command == "run":
        return run(asked.operand, asked.replace)
    if asked.command == "render":
        from voco.commands import render

        print(render.render_rayjob(asked.operand, asked.image or render.IMAGE))
        return 0
    if asked.command == "show":
        from voco.commands import show

        print(show.show_output(storage.resolve(asked.operand)))
        return 0
    if asked.command == "report":
        from voco.report import html

        output = storage.resolve(asked.operand)
        title = Path(output).name
        print(html.write_report(outputs=[output], to=storage.join(output, "report.html"), title=title))
        return 0
    from voco.commands import submit

    where = submit.find_cluster(asked.address)
    if asked.command == "submit":
        return submit.submit(asked.operand, spec.load_job(asked.operand), where, asked.replace)
    return int(getattr(submit, asked.command)(submit.connect(where), asked.operand))


def ask(asked: argparse.Namespace) -> int:
    """Print an answer while it is written."""
    from voco.commands.ask import AskOptions, ask
    from voco.model.sampling import Sampling

    try:
        how = AskOptions(
            cache=None if asked.no_cache else asked.cache,
            tokens=asked.tokens,
            frames=asked.frames,
            max_new_tokens=asked.max_new_tokens,
            sampling=Sampling(asked.temperature, top_p=asked.top_p, seed=asked.seed),
            stop=tuple(asked.stop),
            keep_system=asked.keep_system,
        )
        for piece in ask(asked.operand, asked.media, asked.question, how):
            print(piece, end="", flush=True)
    except ValueError as error:  # numbers out of range, a prompt too long, a cache that is damaged: each says so in a line
        raise Refused(str(error)) from error
    return 0


def run(file: str, replace: bool = False) -> int:
    """The driver: claim the run on this cluster, then do the job."""
    from voco.commands import render
    from voco.run import claim, manifest, ray_init, wandb_tracking

    claim.listen_for_stop()  # a signal that comes while Ray starts counts too
    job = spec.load_job(file)
    run_id = manifest.job_run_id(job)
    ray_init.start_ray(render.most_cpus(job), ray_init.job_modules(job))
    import pipelines

    claim.claim_run(run_id)
    with wandb_tracking.wandb_group(run_id if job.kind in ("flow", "sweep") else None):
        pipelines.run(job, replace)
    return 0
