"""The command `voco`: one job file or one output per command, no options but where and whether to overwrite.

Exit codes: 0 done, 1 failed, 2 refused, 130 stopped; each of the last three says why in one line on stderr.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from voco import spec, storage
from voco.errors import exit_code

COMMANDS = {
    "plan": ("JOB", "check a job file; print stages, inputs, resources and sizes; run nothing"),
    "submit": ("JOB", "send it as a Ray job and follow it"),
    "run": ("JOB", "the driver, inside the cluster"),
    "status": ("RUN", "how a run is: a run id, a submission id or a job file"),
    "logs": ("RUN", "follow a run; Ctrl-C leaves it"),
    "stop": ("RUN", "end a run cleanly; sent again, it continues"),
    "show": ("OUTPUT", "one sample or row of an output made visible"),
    "render": ("JOB", "the same job for another runner: a KubeRay RayJob, to be applied with kubectl"),
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
        if name in ("submit", "run"):
            command.add_argument("--replace", action="store_true", help="overwrite an output that holds another run")
        if name == "render":
            command.add_argument("--kuberay", action="store_true", required=True, help="as a RayJob with its ConfigMap")
            command.add_argument("--image", help="container image with this package installed")
        if name in ("submit", "status", "logs", "stop"):
            command.add_argument("--address", help="of the Jobs API, http://HOST:8265")
    return parser


def _do(asked: argparse.Namespace) -> int:
    if asked.command == "plan":
        from voco import plan

        job = spec.load(asked.operand)
        print("\n".join(plan.lines(asked.operand, job)))
        return plan.verdict(asked.operand, job)
    if asked.command == "run":
        return run(asked.operand, asked.replace)
    if asked.command == "render":
        from voco import kuberay

        print(kuberay.render(asked.operand, asked.image or kuberay.IMAGE))
        return 0
    if asked.command == "show":
        from voco import show

        print(show.show(storage.resolve(asked.operand)))
        return 0
    if asked.command == "report":
        from voco.report import html

        output = storage.resolve(asked.operand)
        title = Path(output).name
        print(html.write(outputs=[output], to=storage.join(output, "report.html"), title=title))
        return 0
    from voco import jobs

    where = jobs.target(asked.address)
    if asked.command == "submit":
        return jobs.submit(asked.operand, spec.load(asked.operand), where, asked.replace)
    return int(getattr(jobs, asked.command)(jobs.connect(where), asked.operand))


def run(file: str, replace: bool = False) -> int:
    """The driver: claim the run on this cluster, then do the job."""
    from voco import kuberay, manifest, running, tracking

    running.listen()  # a signal that comes while Ray starts counts too
    job = spec.load(file)
    run_id = manifest.job_run_id(job)
    running.start_ray(kuberay.most_cpus(job), running.modules(job))
    import pipelines

    running.claim(run_id)
    with tracking.group(run_id if job.kind in ("flow", "sweep") else None):
        pipelines.run(job, replace)
    return 0
