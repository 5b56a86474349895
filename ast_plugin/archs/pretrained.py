"""Networks in Hugging Face folders and repositories: `model.safetensors`, `config.json` and a model card."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from ast_plugin.archs.state import load_into
from ast_plugin.checkpoints import CONFIG, PRETRAINED, read_checkpoint, save_weights
from ast_plugin.errors import BackendUnavailable, CheckpointError, OptionError, one_line
from ast_plugin.files import write_file

# Download arguments of huggingface_hub; the last two exist only before version 1.
_WHERE = ('revision', 'cache_dir', 'force_download', 'local_files_only', 'token', 'proxies', 'resume_download')
_CARD = """\
---
library_name: ast_plugin
pipeline_tag: image-to-image
tags: [image-restoration, {name}]
---

    from ast_plugin.archs.{module} import {name}

    network = {name}.from_pretrained('OWNER/NAME')  # or a folder
"""


class Pretrained(nn.Module):
    """Base class of networks that record their options and can be saved to and loaded from Hugging Face.

    Repositories, but not local folders, require the extra `hub`: pip install "ast_plugin[hub]".

    Attributes:
        options: `type` and the constructor's arguments as JSON values, without those in `transient_options`.
    """

    transient_options: tuple[str, ...] = ()  # arguments that only affect initialisation and are not saved
    variants: Mapping[str, Mapping[str, Any]] = {}  # further registered names of the class, with their defaults
    options: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        signature = inspect.signature(cls.__init__)
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __new__(cls, *args: Any, **options: Any) -> Pretrained:
        self = super().__new__(cls)
        with suppress(TypeError):  # raised again by __init__
            # copy.copy calls __new__ without arguments, and then copies the attributes.
            bound = cls.__signature__.bind_partial(*args, **options)
            bound.apply_defaults()
            kept = {key: _plain(value) for key, value in bound.arguments.items() if key not in cls.transient_options}
            self.options = {'type': cls.__name__, **kept}
        return self

    @staticmethod
    def read_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Infer options from a state dict, for files without metadata; none by default."""
        return {}

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, strict: bool = True, map_location: Any = 'cpu', **options: Any
    ) -> Pretrained:
        """Build a network and load its pretrained weights.

        Args:
            name: folder written by `save_pretrained`, or repository `OWNER/NAME`.
            strict: see `load_into`.
            map_location: device of the network.
            options: arguments of the network, which override those in the files; and arguments of huggingface_hub:
                revision, token, cache_dir, force_download, local_files_only.
        Returns:
            The network in evaluation mode.
        Raises:
            BackendUnavailable: if a repository is requested and huggingface_hub is not installed.
            CheckpointError: if there is no such folder or repository, or its weights belong to another network.
            OptionError: if the files describe another type of network, or its arguments are invalid.
        """
        where = {key: options.pop(key) for key in _WHERE if key in options}
        try:
            folder = Path(name) if Path(name).is_dir() else _download(str(name), where)
            config = json.loads((folder / CONFIG).read_bytes()) if (folder / CONFIG).is_file() else {}
            if not isinstance(config, dict):
                raise ValueError(f'expected an object in {CONFIG}, got {type(config).__name__}')
        except (OSError, ValueError) as error:  # includes the exceptions of huggingface_hub
            raise CheckpointError(
                f'{name}: expected a folder with {PRETRAINED} and {CONFIG}, as written by save_pretrained, or a '
                f'Hugging Face repository that can be reached ({one_line(error)})'
            ) from error
        checkpoint = read_checkpoint(folder)
        stored = checkpoint.network or config
        kind = stored.get('type', cls.__name__)
        if kind != cls.__name__ and kind not in cls.variants:
            raise OptionError(f'{name}: expected the network {cls.__name__}, got {kind}')
        stored = {**cls.variants.get(kind, {}), **(stored or cls.read_options(checkpoint.state))}
        known = {key: value for key, value in stored.items() if key in cls.__signature__.parameters}
        try:
            network = cls(**{**known, **options})
        except TypeError as error:
            raise OptionError(f'{name}: {cls.__name__} cannot be built: {one_line(error)}') from error
        load_into(network, checkpoint, strict=strict)
        return network.eval().to(map_location)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save weights, options and, unless present, a model card to a folder.

        Raises:
            FileError: if a file cannot be written; existing weights are kept.
        """
        folder, name, module = Path(folder), type(self).__name__, type(self).__module__
        with suppress(OSError):  # writing the first file raises it again
            folder.mkdir(parents=True, exist_ok=True)
        save_weights(folder / PRETRAINED, self.state_dict(), self.options)
        write_file(folder / CONFIG, json.dumps(self.options, indent=2).encode())
        if not (folder / 'README.md').exists():
            card = _CARD.format(name=name, module=module.removeprefix('ast_plugin.archs.'))
            write_file(folder / 'README.md', card.encode())

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        **options: Any,
    ) -> str:
        """Upload the files of `save_pretrained` to a repository, and return the URL of the commit.

        Args:
            repository: `OWNER/NAME`; created if it does not exist.
            private: whether a new repository is private.
            token: access token.
            branch: branch to commit to.
            options: further arguments of `HfApi.upload_folder`, such as commit_message.
        Raises:
            BackendUnavailable: if huggingface_hub is not installed. Its own exceptions for network and access problems
                are not converted.
        """
        api = _import_hub().HfApi(token=token)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repository, folder_path=folder, revision=branch, **options)


def _download(repository: str, where: Mapping[str, Any]) -> Path:
    """Download the files of a repository, and return their folder."""
    hub = _import_hub()
    from huggingface_hub.utils import EntryNotFoundError

    with suppress(EntryNotFoundError):
        hub.hf_hub_download(repository, CONFIG, **where)
    return Path(hub.hf_hub_download(repository, PRETRAINED, **where)).parent


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise BackendUnavailable('huggingface_hub is not installed: pip install "ast_plugin[hub]"') from error
    return huggingface_hub


def _plain(value: Any) -> Any:
    """Convert a value to the form that JSON reads back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
