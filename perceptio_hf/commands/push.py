"""`perceptio push`: a saved Perceptio with its processor, code and card to the Hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from perceptio_hf.hub.upload import UploadPlan


def push(
    folder: Annotated[Path, typer.Argument(help="A saved Perceptio with its processor.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Where it goes on the Hub: owner/name.", show_default=False)],
    dry_run: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Upload nothing: write all that would be into OUT.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the OUT of an earlier --dry-run.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Default: HF_TOKEN, or what `hf auth login` stored.", show_default=False)
    ] = None,
    branch: Annotated[
        str | None, typer.Option("--branch", "--revision", help="Default: main.", show_default=False)
    ] = None,
    message: Annotated[str, typer.Option(help="The commit's title.")] = "Upload a Perceptio",
    license: Annotated[
        str | None, typer.Option(help="The licence of the weights, e.g. apache-2.0.", show_default=False)
    ] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What it was made from, Hub names; can be repeated.", show_default=False),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Hub data sets it was trained on; can be repeated.", show_default=False),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE", help="Languages it knows, e.g. en; can be repeated.", show_default=False),
    ] = None,
    eval_results: Annotated[
        Path | None,
        typer.Option(metavar="YAML", help="Evaluation results for the card, as a model-index.", show_default=False),
    ] = None,
    new_card: Annotated[
        bool, typer.Option("--new-card", help="Write a new card although FOLDER has a README.md.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")] = False,
) -> None:
    """Upload the checkpoint in FOLDER to the repository REPO: weights, processor, code and model card.

    A README.md in FOLDER is kept as the card; what the options say is set in its metadata. Without one, the card is
    written from what the folder tells. Other files of the folder stay on your disk.
    """
    from perceptio_hf.files import check_new_folder, new_folder

    from .checkpoints import quieten

    if dry_run is not None:
        check_new_folder(dry_run, overwrite, sources := (folder, eval_results))
    elif overwrite:
        raise ValueError("--overwrite is about the OUT of --dry-run; a push adds a commit and replaces no repository.")
    quieten()

    from perceptio_hf.hub.card import CardFacts, read_results
    from perceptio_hf.hub.upload import plan_upload, upload

    facts = CardFacts(
        license=license,
        base_models=tuple(base_model or ()),
        datasets=tuple(dataset or ()),
        languages=tuple(language or ()),
        results=read_results(eval_results) if eval_results else (),
    )
    plan = plan_upload(folder, repo, facts, card_anew=new_card)
    if dry_run is not None:
        with new_folder(dry_run, overwrite, sources) as partial:
            plan.write(partial)
        _report(plan, str(dry_run), uploaded=False, as_json=as_json)
        return
    url = upload(plan, token=token, private=private, branch=branch, message=message)
    _report(plan, url, uploaded=True, as_json=as_json)


def _report(plan: "UploadPlan", place: str, *, uploaded: bool, as_json: bool) -> None:
    if as_json:
        document = {
            "repo": plan.repo,
            "url" if uploaded else "folder": place,
            "uploaded": uploaded,
            "files": list(plan.files),
            "left_out": list(plan.left_out),
            "keeps_card": plan.keeps_card,
        }
        print(json.dumps(document, indent=2))
        return
    print(f"{'Uploaded' if uploaded else 'Would upload'} {len(plan.files)} files to {plan.repo}: {place}")
    if plan.left_out:
        print(f"Left out: {', '.join(plan.left_out)}")
    if plan.keeps_card:
        print("The card is the folder's README.md; --new-card writes one.")
