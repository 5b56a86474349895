"""Networks in folders and repositories of Hugging Face: `model.safetensors`, `config.json` and a model card."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ast_plugin.archs.state import load_into
from ast_plugin.checkpoints import CONFIG, PRETRAINED, read_checkpoint, save_weights
from ast_plugin.errors import BackendUnavailable, CheckpointError, FileError, OptionError, PluginError, one_line

# What finds a file of a repository; the last two before version 1.
_WHERE = ('revision', 'cache_dir', 'force_download', 'local_files_only', 'token', 'proxies', 'resume_download')


class Pretrained(nn.Module):
    """A network that remembers its options, and with them goes to Hugging Face and comes from there.

    It needs the extra `hub`: pip install "ast_plugin[hub]".

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
    def from_pretrained(cls, name: str | Path, **options: Any) -> Pretrained:
        """Build a network, and load its weights.

        Args:
            name: a folder that `save_pretrained` wrote, or a repository, `OWNER/NAME`.
            options: arguments of the network that go before those in the files; `map_location` and `strict`; and what
                huggingface_hub takes: revision, token, cache_dir, force_download, local_files_only.
        Returns:
            The network, in evaluation mode.
        Raises:
            BackendUnavailable: without huggingface_hub.
            CheckpointError: if there is no such folder or repository, or its weights are not of this network.
            OptionError: if it is of another type of network, or its arguments are wrong.
        """
        try:
            return _on_hub(cls).from_pretrained(name, **options)
        except PluginError:
            raise
        # huggingface_hub's own are among them; it takes the attributes of a config.json that is no object.
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f'{name}: expected a folder with {PRETRAINED} and {CONFIG}, as save_pretrained writes them, or a '
                f'repository of Hugging Face that can be reached ({one_line(error)})'
            ) from error

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write weights, options and a model card into a folder; `options` are those of huggingface_hub's mixin.

        Raises:
            BackendUnavailable: without huggingface_hub.
            FileError: if a file cannot be written; the weights that were there stay.
        """
        try:
            self._with_hub().save_pretrained(folder, config=self.options, **options)
        except OSError as error:
            raise FileError(f'{folder} cannot be written: {one_line(error)}') from error

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes, and return the commit's address; `options` are those of the mixin.

        Raises:
            BackendUnavailable: without huggingface_hub, which raises its own errors of network and rights.
        """
        return self._with_hub().push_to_hub(repository, config=self.options, **options)

    def _with_hub(self) -> Any:
        """This network with huggingface_hub's methods, sharing all that it has."""
        hub_type = _on_hub(type(self))
        network = object.__new__(hub_type)
        network.__dict__ = self.__dict__
        return network


@functools.cache
def _on_hub(network_type: type[Pretrained]) -> Any:
    """A network's type with huggingface_hub's mixin, whose import takes long: only who needs it pays for it."""
    try:
        from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
    except ImportError as error:
        raise BackendUnavailable('huggingface_hub is not installed: pip install "ast_plugin[hub]"') from error
    own = network_type.__name__

    class OnHub(
        PyTorchModelHubMixin,
        network_type,
        library_name='ast_plugin',
        pipeline_tag='image-to-image',
        tags=['image-restoration', own],
    ):
        """Files are written and read as all weights here: with the options in them, and safely."""

        def _save_pretrained(self, save_directory: Path) -> None:
            save_weights(save_directory / PRETRAINED, self.state_dict(), self.options)

        @classmethod
        def _from_pretrained(
            cls, *, model_id: str, map_location: Any = 'cpu', strict: bool = True, config: Any = None, **given: Any
        ) -> Pretrained:
            where = {key: given.pop(key) for key in _WHERE if key in given}
            is_folder = Path(model_id).is_dir()
            checkpoint = read_checkpoint(model_id if is_folder else hf_hub_download(model_id, PRETRAINED, **where))
            told = checkpoint.network or config or {}
            kind = told.get('type', own)
            if kind != own and kind not in network_type.variants:
                raise OptionError(f'{model_id} is of the network {kind}: expected {own}')
            told = network_type.variants.get(kind, {}) | (told or network_type.read_options(checkpoint.state))
            known = network_type.__signature__.parameters
            try:
                network = network_type(**{key: told[key] for key in told if key in known} | given)
            except TypeError as error:
                raise OptionError(f'{model_id}: {own} cannot be built: {one_line(error)}') from error
            load_into(network, checkpoint, strict=strict)
            return network.eval().to(map_location)

    return OnHub


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
