"""Networks in folders and repositories of Hugging Face: `model.safetensors`, `config.json` and a model card."""

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

# What finds a file of a repository; the last two before version 1 of huggingface_hub.
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
    """A network that remembers its options, and with them goes to Hugging Face and comes from there.

    Folders need nothing else; repositories need the extra `hub`: pip install "ast_plugin[hub]".

    Attributes:
        options: `type` and the constructor's arguments as JSON has them, without those of `transient_options`.
    """

    transient_options: tuple[str, ...] = ()  # arguments that say where training starts, not what the network is
    variants: Mapping[str, Mapping[str, Any]] = {}  # further registered names of it, and their defaults
    options: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        signature = inspect.signature(cls.__init__)
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __new__(cls, *args: Any, **options: Any) -> Pretrained:
        self = super().__new__(cls)
        with suppress(TypeError):  # which __init__ raises, too
            # A copy is made without arguments, and then gets what the original has.
            bound = cls.__signature__.bind_partial(*args, **options)
            bound.apply_defaults()
            kept = {key: _plain(value) for key, value in bound.arguments.items() if key not in cls.transient_options}
            self.options = {'type': cls.__name__, **kept}
        return self

    @staticmethod
    def read_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what names and shapes of a state tell of the options, where nothing else does."""
        return {}

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, strict: bool = True, map_location: Any = 'cpu', **options: Any
    ) -> Pretrained:
        """Build a network, and load its weights.

        Args:
            name: a folder that `save_pretrained` wrote, or a repository, `OWNER/NAME`.
            strict: see `load_into`.
            map_location: the device of the network.
            options: arguments of the network that go before those in the files; and what huggingface_hub takes:
                revision, token, cache_dir, force_download, local_files_only.
        Returns:
            The network, in evaluation mode.
        Raises:
            BackendUnavailable: without huggingface_hub, for a repository.
            CheckpointError: if there is no such folder or repository, or its weights are not of this network.
            OptionError: if it is of another type of network, or its arguments are wrong.
        """
        where = {key: options.pop(key) for key in _WHERE if key in options}
        try:
            folder = Path(name) if Path(name).is_dir() else _download(str(name), where)
            config = json.loads((folder / CONFIG).read_bytes()) if (folder / CONFIG).is_file() else {}
            if not isinstance(config, dict):
                raise ValueError(f'{CONFIG} holds a {type(config).__name__}, no object')
        except (OSError, ValueError) as error:  # huggingface_hub's own are among them
            raise CheckpointError(
                f'{name}: expected a folder with {PRETRAINED} and {CONFIG}, as save_pretrained writes them, or a '
                f'repository of Hugging Face that can be reached ({one_line(error)})'
            ) from error
        checkpoint = read_checkpoint(folder)
        told = checkpoint.network or config
        kind = told.get('type', cls.__name__)
        if kind != cls.__name__ and kind not in cls.variants:
            raise OptionError(f'{name} is of the network {kind}: expected {cls.__name__}')
        told = {**cls.variants.get(kind, {}), **(told or cls.read_options(checkpoint.state))}
        known = {key: value for key, value in told.items() if key in cls.__signature__.parameters}
        try:
            network = cls(**{**known, **options})
        except TypeError as error:
            raise OptionError(f'{name}: {cls.__name__} cannot be built: {one_line(error)}') from error
        load_into(network, checkpoint, strict=strict)
        return network.eval().to(map_location)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, options and, where there is none, a model card into a folder.

        Raises:
            FileError: if a file cannot be written; the weights that were there stay.
        """
        folder, name, module = Path(folder), type(self).__name__, type(self).__module__
        with suppress(OSError):  # which the first file meets, too
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
        """Upload what `save_pretrained` writes, and return the commit's address.

        Args:
            repository: `OWNER/NAME`; it is made where it is not there.
            private, token, branch: of the repository, and of huggingface_hub.
            options: further ones of its `HfApi.upload_folder`, such as commit_message.
        Raises:
            BackendUnavailable: without huggingface_hub, which raises its own errors of network and rights.
        """
        api = _import_hub().HfApi(token=token)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repository, folder_path=folder, revision=branch, **options)


def _download(repository: str, where: Mapping[str, Any]) -> Path:
    """Fetch the files of a repository, and return their folder."""
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
    """A value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
