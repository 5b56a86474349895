"""A block in the place of a module of somebody's network: layouts are turned, tokens get their size from the caller."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.archs.blocks import token_sizes
from ast_plugin.archs.mixed.call_sites import Site, SizePlace
from ast_plugin.errors import ShapeError

OPERATIONS = ('replace', 'append', 'prepend', 'wrap')


class PassSize:
    """Hook before a module that knows H and W: remembers them for the blocks below it, until `ForgetSize`."""

    def __init__(self, place: SizePlace) -> None:
        self.place, self.key = place, place.name

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        setattr(token_sizes, self.key, self.place.read(args, kwargs))


class ForgetSize:
    """Hook behind that module, however it ended."""

    def __init__(self, place: SizePlace) -> None:
        self.key = place.name

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        setattr(token_sizes, self.key, None)


def pass_size(giver: nn.Module, place: SizePlace) -> None:
    """Let `giver` tell the blocks below it the size that it is called with."""
    giver.register_forward_pre_hook(PassSize(place), with_kwargs=True)
    giver.register_forward_hook(ForgetSize(place), always_call=True)


class MixedIn(nn.Module):
    """A block in the place of a module, called as that was.

        replace   block(x)
        append    block(original(x))
        prepend   original(block(x))
        wrap      y + gain · block(norm(y)), y being original(x): a branch as transformers have them

    Args:
        block: see `block_registry` for what it is called with.
        works_in: how.
        site: what the module worked on.
        op: one of `OPERATIONS`.
        original: the module that stood there; None for `replace`.
        gain: what each channel of the branch begins with, for `wrap`: 0 leaves the network as it was.
    Raises:
        ShapeError: in the forward pass, if the caller gives the tokens' size no longer, or another one.
    """

    def __init__(
        self, block: nn.Module, works_in: str, site: Site, op: str, original: nn.Module | None, gain: float = 0.0
    ) -> None:
        super().__init__()
        self.block, self.original = block, original
        self.works_in, self.site, self.op = works_in, site, op
        self.size_key = site.size.name if site.size is not None else ''
        self.norm = self.gain = None
        if op == 'wrap':
            dim = site.output[1 if site.kind == 'nchw' else -1]
            self.norm = nn.LayerNorm(dim)
            self.gain = nn.Parameter(torch.full((dim,), float(gain)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        key = self.site.x_key
        x = args[key] if isinstance(key, int) else kwargs[key]
        if self.op in ('append', 'wrap'):
            return self._through(self.original(*args, **kwargs), args, kwargs)
        y = self._through(x, args, kwargs)
        if self.op == 'replace':
            return y
        if isinstance(key, int):
            return self.original(*args[:key], y, *args[key + 1 :], **kwargs)
        return self.original(*args, **{**kwargs, key: y})

    def _through(self, y: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The block on y, which has the site's layout."""
        kind = self.site.kind
        last = y.permute(0, 2, 3, 1) if kind == 'nchw' else y
        if self.gain is None:
            last = self._run(last, args, kwargs)
        else:
            last = last + self.gain * self._run(self.norm(last), args, kwargs)
        return last.permute(0, 3, 1, 2) if kind == 'nchw' else last

    def _run(self, x: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The block on x, channels last: windows, tokens or a map."""
        if self.works_in == 'any':
            return self.block(x)
        if self.site.kind == 'windows':
            mask = self._window_mask(x, args, kwargs)
            return self.block(x, mask) if self.works_in == 'windows' else self.block.attend_windows(x, mask)
        if self.site.kind == 'tokens':
            size = self._size(x)
            if self.works_in == 'tokens':
                return self.block(x, size)
            return self._run_map(x.unflatten(1, size)).flatten(1, 2)
        if self.works_in == 'tokens':
            size = (x.shape[1], x.shape[2])
            return self.block(x.flatten(1, 2), size).unflatten(1, size)
        return self._run_map(x)

    def _run_map(self, x: Tensor) -> Tensor:
        if self.works_in == 'nchw':
            return self.block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.block(x)

    def _size(self, x: Tensor) -> tuple[int, int]:
        size = getattr(token_sizes, self.size_key, None)
        giver = self.site.size.giver or 'the base'
        tokens = f'the tokens {list(x.shape)} of {self.site.name}'
        if size is None:
            raise ShapeError(f'{tokens} have no size outside of {giver}, which is told height and width')
        if size[0] * size[1] != x.shape[1]:
            raise ShapeError(f'{tokens} are not the {size[0]}x{size[1]} that {giver} is told')
        return size

    def _window_mask(self, x: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Of what the caller gives besides x, the tensor [num_windows, T, T]."""
        tokens = x.shape[1]
        for key, value in (*enumerate(args), *kwargs.items()):
            # x looks the same where a window has as many tokens as there are channels
            if (
                key != self.site.x_key
                and isinstance(value, Tensor)
                and value.shape[1:] == (tokens, tokens)
                and value.is_floating_point()
            ):
                return value
        return None

    def extra_repr(self) -> str:
        return f'{self.op}, {self.site.kind}'
