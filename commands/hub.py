"""The commands of `tinymim hub`: flags and help, no logic. Each command imports its stage when it runs."""

from typing import Annotated

from cyclopts import App, Parameter

from tinymim.commands.shared import print_json

hub_app = App(
    name="hub",
    help="""Push caches and trained models to the Hugging Face hub, and pull them.

The token comes from HF_TOKEN or `hf auth login`. Without a pull, caches, shards
and weights are also read in place: hf://datasets/OWNER/NAME, hf://OWNER/NAME.""",
    sort_key=10,
)


@hub_app.command(name="push", sort_key=0)
def hub_push(
    source: Annotated[str, Parameter(name="RUN|CACHE")],
    repo: Annotated[str, Parameter(name="REPO")],
    /,
    *,
    public: Annotated[bool, Parameter(negative="")] = False,
    allow_licence: Annotated[list[str] | None, Parameter(name="--allow-licence", negative="")] = None,
    images_licence: str | None = None,
    message: str | None = None,
) -> None:
    """Push a cache as a dataset, or a trained model as a model, with a card.

    Reads a cache, packed or not, or a run folder with finished weights.
    Writes the repository REPO, private if it is new. A cache is packed beside
    itself first, which takes its size on disk; a packed one is sent as it is. The
    card states the licences of teachers and images. A teacher whose licence may
    forbid sharing is refused.
    Prints JSON: repo, kind, url, commit, files, bytes.

    Example: tinymim hub push caches/mine me/mine --images-licence cc0-1.0

    Parameters
    ----------
    source
        Folder or URL of a cache, or a run folder.
    repo
        OWNER/NAME.
    public
        Make a new repository public.
    allow_licence
        A teacher's licence that you have read and that permits this push. May be repeated.
    images_licence
        Licence of the images, for the card of a cache.
    message
        Message of the commit.
    """
    from tinymim.stages import hub as stage

    report = stage.push(
        source,
        repo,
        public=public,
        allow_licence=allow_licence or (),
        images_licence=images_licence,
        message=message,
    )
    print_json(report)


@hub_app.command(name="pull", sort_key=1)
def hub_pull(repo: Annotated[str, Parameter(name="REPO")], target: Annotated[str, Parameter(name="DST")], /) -> None:
    """Fetch a cache or a model from the hub.

    Reads the repository REPO: OWNER/NAME[@REVISION], a dataset if there is one of
    this name, else a model.
    Writes DST: a cache is unpacked, and every byte is compared with its digest; a
    stopped pull resumes. A model becomes a folder that timm loads by local-dir:.
    Prints JSON: repo, kind, target.

    Example: tinymim hub pull me/mine caches/mine

    Parameters
    ----------
    repo
        OWNER/NAME[@REVISION], also with hf:// or hf://datasets/ in front.
    target
        New folder; for a cache also a URL in an object store.
    """
    from tinymim.configs.place import parse_place
    from tinymim.stages import hub as stage

    print_json(stage.pull(repo, parse_place(target)))
