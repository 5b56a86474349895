"""Workers out of reach of the signals that their parent's group gets."""

import os
import signal
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ast_plugin.data import workers


class Groups(Dataset):
    """Which group of processes prepares a sample, and how many signals it does not hear."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([os.getpgrp(), len(signal.pthread_sigmask(signal.SIG_BLOCK, []) & workers._SIGNALS)])


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_workers_have_groups_of_their_own_and_hear_again(method):
    begun = []
    loader = DataLoader(
        Groups(),
        1,
        num_workers=2,
        worker_init_fn=partial(workers.start_apart, begun.append if method == 'fork' else None),
        multiprocessing_context=method,
    )
    with workers.block_signals():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) >= workers._SIGNALS
        iterator = iter(loader)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & workers._SIGNALS
    groups = {int(group) for sample in iterator for group, blocked in sample if blocked == 0}
    assert len(groups) == 2 and os.getpgrp() not in groups


@pytest.mark.parametrize(('sender', 'status'), [('the group', 7), ('the parent', 0)])
def test_what_comes_while_a_worker_starts(sender, status):
    reader, writer = os.pipe()
    with workers.block_signals():
        child = os.fork()
        if child == 0:
            os.read(reader, 1)
            if sender == 'the group':
                os.kill(os.getpid(), signal.SIGTERM)
            workers.start_apart(None, 0)
            os._exit(7)
    if sender == 'the parent':
        os.kill(child, signal.SIGTERM)
    os.write(writer, b'.')
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    os.close(reader)
    os.close(writer)
