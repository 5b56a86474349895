"""RestorationModel (`model_type: RestorationModel`), an extension of BasicSR's SRModel for image restoration."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from functools import cache, partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import master_only
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ast_plugin.archs.state import load_into
from ast_plugin.checkpoints import STATE, WEIGHTS, keep_newest, read_checkpoint, read_state, save_torch, save_weights
from ast_plugin.data import randomness
from ast_plugin.data.contact_sheet import join_images
from ast_plugin.data.randomness import epoch_of
from ast_plugin.data.transforms import to_unit_range
from ast_plugin.devices import keep_freed_memory
from ast_plugin.errors import DataError
from ast_plugin.evaluation.results import ValidationResults, describe_provenance
from ast_plugin.evaluation.validator import Validator
from ast_plugin.models import network_switches, optimizers, run_state, training_step
from ast_plugin.models.processes import FAILED, Processes, RunStopped, follow, received_signal
from ast_plugin.models.run_log import RunLog, TrainingProgress
from ast_plugin.names import file_name, printable, say
from ast_plugin.ops import frozen_weights


class RestorationModel(SRModel):
    """Model for training and testing an image restoration network that predicts `gt` from `lq`.

    Additions to SRModel: any number of losses (every option of `train` that ends in `_opt`), the schedules in
    `models.optimizers`, validation of images of any size, metrics of the input next to those of the result, best
    weights in addition to the latest, safe reading and atomic writing of weights files.

    Additional option keys: those of `train` documented in `TrainingStep`, `Precision`, `Mixup` and
    `network_switches.apply`; `val.protocol`, which defines how images are restored and measured, see
    `evaluation.protocols`; and `val.best_metric`, the metric in `val.metrics` that selects the best weights (default:
    the first). These are saved as `models/net_g_best.pth` and as `net_g_best.safetensors` with the network's options.

    Args:
        opt: options prepared for BasicSR, modified in place as in BasicSR's models; `build_model` passes a copy.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self.recorded = run_state.record(opt) if opt['is_train'] else {}
        self.progress: TrainingProgress | None = None
        self.processes = Processes()
        self.validator = Validator.from_options(opt, self._image_path, self.processes)
        self.validated_at: dict[str, int] = {}  # iteration of the last validation by dataset
        self.note = cache(logging.getLogger('basicsr').info)  # logs each note, such as one on memory, once
        self.log_dict: Mapping[str, float] = {}
        self.run_log = RunLog.from_options(opt, self.processes.rank)
        self.iteration = self.saved_at = self.trained_at = 0
        opt['path'].setdefault('param_key_g', None)  # otherwise SRModel uses 'params'
        super().__init__(opt)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Apply the training switches, move the network to the device and wrap it for parallel training."""
        return super().model_to_device(network_switches.apply(net, self.opt['train']) if self.is_train else net)

    def init_training_settings(self) -> None:
        """Build losses, moving average, optimisers, schedules and the training step."""
        self.net_g.train()
        if self.device.type == 'cpu':
            keep_freed_memory()
        train_opt = self.opt['train']
        self.ema_decay = train_opt.get('ema_decay') or 0
        if self.ema_decay > 0:
            self.net_g_ema = deepcopy(self.get_bare_model(self.net_g)).eval().requires_grad_(False)
            path = self.opt['path']
            if path.get('pretrain_network_g') is not None:
                key = path['param_key_g'] if path['param_key_g'] != 'params' else None  # the average if available
                self.load_network(self.net_g_ema, path['pretrain_network_g'], path.get('strict_load_g', True), key)
        self.losses = training_step.build_losses(train_opt, self.device)
        precision = training_step.Precision(train_opt.get('precision') or 'fp32', self.device)
        precision.check_wrapper(self.net_g)
        self.setup_optimizers()
        self.setup_schedulers()
        self.mixing = training_step.build_mixup(train_opt, self.opt.get('manual_seed') or 0, self.opt.get('rank', 0))
        self.step = training_step.TrainingStep(
            self.net_g, self.optimizer_g, precision, train_opt, batch=training_step.batch_size(self.opt)
        )

    def setup_schedulers(self) -> None:
        """Build the schedule of each optimiser, the plugin's or BasicSR's."""
        self.schedulers = [optimizers.build_schedule(optimizer, self.opt['train']) for optimizer in self.optimizers]

    @master_only
    def print_network(self, net: nn.Module) -> None:
        """Log the network's name and number of parameters, instead of its whole structure."""
        net = self.get_bare_model(net)
        count = sum(parameter.numel() for parameter in net.parameters())
        get_root_logger().info(f'Network: {type(net).__name__}, with parameters: {count:,d}')

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """Step the schedules before an iteration and apply BasicSR's linear warm-up to their rates.

        Raises:
            RunStopped: see `leave_if_asked`.
        """
        self.leave_if_asked()
        self.iteration = current_iter
        for scheduler in self.schedulers:
            optimizers.restore_rates(scheduler)
        super().update_learning_rate(current_iter, warmup_iter)

    def feed_data(self, data: Mapping[str, Any]) -> None:
        """Move a batch to the device, convert 8-bit images to float there, and keep their names for messages."""
        # Copies from pinned memory are asynchronous.
        self.lq = to_unit_range(data['lq'].to(self.device, non_blocking=True))
        self.__dict__.pop('gt', None)  # of the previous batch; a batch may have no gt
        if 'gt' in data:
            self.gt = to_unit_range(data['gt'].to(self.device, non_blocking=True))
        self.images = list(data.get('lq_path', ()))

    def optimize_parameters(self, current_iter: int) -> None:
        """Perform a training step on the current batch; no effect if it is skipped because of non-finite values."""
        if self.progress is None:
            total, is_shown = self.opt['train']['total_iter'], self.processes.rank == 0
            self.progress = TrainingProgress(total, current_iter - 1, get_root_logger(), self.device, is_shown)
        self.progress.begin()
        if self.mixing is not None:
            self.lq, self.gt = self.mixing(self.lq, self.gt, current_iter)
        compute_losses = partial(training_step.compute_losses, self.losses)
        self.log_dict, changed = self.step(self.lq, self.gt, compute_losses, current_iter, self.images)
        if changed and self.ema_decay > 0:
            self.model_ema(self.ema_decay)
        self.run_log.add_iteration(current_iter, self.get_current_learning_rate()[0], self.log_dict)
        self.progress.advance(self.log_dict)
        self.trained_at = current_iter

    def model_ema(self, decay: float = 0.999) -> None:
        """Update the averaged weights with the current ones."""
        training_step.update_average(self.net_g_ema, self.get_bare_model(self.net_g), decay)

    def _pause(self, is_over: bool = False) -> None:
        """Draw the logged values and exclude the time since the last step from the timing."""
        self.run_log.draw(at_once=is_over)
        if self.progress is not None:
            self.progress.pause()

    @property
    def evaluated_network(self) -> nn.Module:
        """The network used for testing and saved as best weights: the moving average if there is one."""
        return self.net_g_ema if hasattr(self, 'net_g_ema') else self.get_bare_model(self.net_g)

    def test(self) -> None:
        """Restore the current images, of any size, as defined by the protocol."""
        with network_switches.eager_blocks():
            self.output = self.validator.protocol.restore(self.evaluated_network, self.lq, on_note=self.note)

    def validation(
        self, dataloader: DataLoader, current_iter: int | str, tb_logger: Any, save_img: bool = False
    ) -> None:
        """Validate without changing the random state of training."""
        with randomness.preserved():
            super().validation(dataloader, current_iter, tb_logger, save_img)
        self._pause(is_over=self.is_train and current_iter > self.opt['train']['total_iter'])

    def dist_validation(self, dataloader: DataLoader, current_iter: int | str, tb_logger: Any, save_img: bool) -> None:
        """Validate with all processes: each restores its share, all receive the results, the first one writes them."""
        self.nondist_validation(dataloader, current_iter, tb_logger, save_img)
        self.processes.wait()  # for the first one to write, with a longer timeout than a training step has

    def nondist_validation(
        self, dataloader: DataLoader, current_iter: int | str, tb_logger: Any, save_img: bool
    ) -> None:
        """Restore and measure a dataset, log the means, and save the weights during training if they are the best.

        Raises:
            DataError: if the dataset is empty.
        """
        name = dataloader.dataset.opt['name']
        if len(dataloader) == 0:
            raise DataError(f'the validation set {name} holds no images')
        if self.is_train:
            # BasicSR validates again after the last iteration, with a counter beyond it.
            current_iter = min(current_iter, max(self.opt['train']['total_iter'], self.iteration))
            if self.validated_at.get(name) == current_iter:
                return
            self.validated_at[name] = current_iter
        results = self.measure(dataloader, current_iter, save_img)
        for image, thumbnails in results.thumbnails.items() if tb_logger else ():
            tag = f'{name}/{printable(image)}'
            tb_logger.add_image(tag, join_images(thumbnails), current_iter, dataformats='HWC')
        if not results.mean():
            if self.validator.metrics:
                self.note(f'{name} is restored but not measured: it has no gt')
            return
        self.metric_results = results.mean()
        if not self.is_train:
            self._write_results(results)
            return
        self._initialize_best_metric_results(name)
        metric = self.opt['val'].get('best_metric') or next(iter(self.metric_results))
        best, value = self.best_metric_results[name][metric], self.metric_results[metric]
        improved = value > best['val'] if best['better'] == 'higher' else value < best['val']
        # Before its value is set: a state saved after a failure must not claim weights that were not written.
        if improved and name == next(iter(self.best_metric_results)):  # the first dataset decides
            self.save_best()
        for each, mean in self.metric_results.items():
            self._update_best_metric_result(name, each, mean, current_iter)
        self._log_validation_metric_values(current_iter, name, tb_logger)
        self.run_log.add_validation(current_iter, name, self.metric_results)
        if self.progress is not None:
            self.progress.best = f'best {metric} {self.best_metric_results[name][metric]["val"]:.2f}'

    def measure(
        self, dataloader: DataLoader, current_iter: int | str = '', save_img: bool = False
    ) -> ValidationResults:
        """Restore a dataset and measure its images with `val.metrics` before and after restoration."""
        with frozen_weights():
            return self.validator.measure(self._restore, dataloader, current_iter, save_img)

    def _restore(self, sample: dict[str, Any]) -> Mapping[str, Tensor]:
        if self.is_train and self.processes.count == 1:  # several processes are not synchronized here
            self.leave_if_asked()
        self.feed_data(sample)
        self.test()
        visuals = self.get_current_visuals()
        for used in ('lq', 'gt', 'output'):
            self.__dict__.pop(used, None)
        return visuals

    def _image_path(self, dataset: str, image: str, current_iter: int | str) -> Path:
        folder = Path(self.opt['path']['visualization'])
        if self.is_train:
            return folder / file_name(image) / file_name(image, f'_{current_iter}.png')
        return folder / dataset / file_name(image, f'_{self.opt["val"].get("suffix") or self.opt["name"]}.png')

    @master_only
    def _write_results(self, results: ValidationResults) -> None:
        weights = self.opt['path'].get('pretrain_network_g')
        protocol, metrics = self.validator.protocol, self.validator.metrics
        results.provenance = describe_provenance(protocol, metrics, weights, self.device)
        sheet = results.write(Path(self.opt['path']['results_root']))
        say('', results.dataset, '', *results.to_markdown().split('\n'), '')
        if sheet is not None:
            say(f'Worst and best images: {sheet}')

    def _initialize_best_metric_results(self, dataset_name: str) -> None:
        """Initialize best values, also for metrics that were added after the resumed state was written."""
        super()._initialize_best_metric_results(dataset_name)
        known = self.best_metric_results[dataset_name]
        for metric, options in self.opt['val']['metrics'].items():
            better = options.get('better', 'higher')
            known.setdefault(metric, {'better': better, 'val': inf if better == 'lower' else -inf, 'iter': -1})

    @master_only
    def save_best(self) -> None:
        """Save the current weights as the best, in BasicSR's format and as safetensors with the network's options."""
        folder = Path(self.opt['path']['models'])
        save_torch(folder / 'net_g_best.pth', self.weights())
        network, given = self.evaluated_network, self.opt['network_g']
        starts = getattr(network, 'transient_options', ())  # describe the initialization, not the network
        options = {key: value for key, value in given.items() if key not in starts}
        save_weights(folder / 'net_g_best.safetensors', network.state_dict(), options)

    def save(self, epoch: int, current_iter: int) -> None:
        """Save weights and training state atomically, then delete old ones.

        BasicSR passes -1 at the end of a run: the last iteration is saved, so that a longer run can resume from it.
        """
        if current_iter == -1:
            self._save_iteration()
        else:
            self._save_weights(current_iter)
            if self.processes.rank == 0:
                keep_newest(Path(self.opt['path']['models']), WEIGHTS, current_iter, self._num_kept())
            self.save_training_state(epoch, current_iter)
        self._pause(is_over=current_iter == -1)

    @master_only
    def _save_weights(self, which: int | str) -> None:
        save_torch(Path(self.opt['path']['models']) / WEIGHTS.format(which), self.weights())

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the network's weights, and their moving average if there is one, by the keys of BasicSR's files."""
        networks = {'params': self.get_bare_model(self.net_g), 'params_ema': getattr(self, 'net_g_ema', None)}
        return {
            key: {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
            for key, network in networks.items()
            if network is not None
        }

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """Save the training state, see `run_state`; delete older states after it has been read back successfully."""
        state = run_state.collect(self, epoch, current_iter)
        if self.processes.rank == 0:
            folder = Path(self.opt['path']['training_states'])
            self.run_log.flush(durably=True)
            save_torch(folder / STATE.format(current_iter), state)
            read_state(folder / STATE.format(current_iter))
            keep_newest(folder, STATE, current_iter, self._num_kept())
        self.saved_at = current_iter

    def _num_kept(self) -> int:
        return (self.opt.get('logger') or {}).get('keep_checkpoints') or 3

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Restore a training state, see `run_state.restore`; validate if the interrupted run would do so next."""
        run_state.restore(self, resume_state, self.recorded)
        self.iteration = self.saved_at = iteration = resume_state['iter']
        val = self.opt.get('val') or {}
        if val.get('val_freq') and iteration % val['val_freq'] == 0:  # BasicSR saves before it validates
            for key, options in self.opt['datasets'].items():
                if key.split('_')[0] == 'val':
                    loader = build_dataloader(
                        build_dataset(options),
                        options,
                        num_gpu=self.opt['num_gpu'],
                        dist=self.opt['dist'],
                        sampler=None,
                        seed=self.opt['manual_seed'],
                    )
                    self.validation(loader, iteration, None, val.get('save_img', False))

    def leave_if_asked(self) -> None:
        """Save and stop the run between two iterations if any of its processes has received a stop signal.

        Raises:
            RunStopped: in that case.
            SystemExit: if another process has failed and reports the reason.
        """
        number = self._max_over_processes(received_signal() or 0)
        if not number:
            return
        if self.iteration:
            self._save_iteration()
        if number == FAILED:
            follow()
        if self.progress is not None:
            self.progress.bar.close()
        self.processes.wait()  # the launcher would end the first process while it writes if another one exited earlier
        raise RunStopped(number, self.iteration)

    def save_unsaved(self, is_loading: bool) -> int:
        """Save the progress since the last state when an error stops the run between two iterations.

        Args:
            is_loading: whether the error occurred while waiting for a batch; other processes then save as well, at
                their check before the next iteration, see `leave_if_asked`.
        Returns:
            The saved iteration; 0 if none was saved because the error occurred within an iteration, or because other
            processes are not synchronized.
        """
        if not self.is_train or not 0 < self.trained_at == self.iteration:
            return 0
        if self.processes.count > 1:
            if not is_loading or self.iteration >= self.opt['train']['total_iter']:
                return 0
            self._max_over_processes(FAILED)
        self._save_iteration()
        return self.iteration

    def _max_over_processes(self, number: int) -> int:
        """Return the maximum of `number` over all processes, which must all call this."""
        if self.processes.count == 1:
            return number
        numbers = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        return int(numbers)

    def _save_iteration(self) -> None:
        if self.iteration != self.saved_at:
            iters_per_epoch = self.opt['train'].get('iters_per_epoch') or self.opt['train']['total_iter']
            self.save(epoch_of(self.iteration, iters_per_epoch)[0], self.iteration)
        self._save_weights('latest')

    def load_network(self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = None) -> None:
        """Load weights (official, BasicSR's or safetensors) without executing code from the file.

        Raises:
            CheckpointError: if the file cannot be used.
        """
        checkpoint = read_checkpoint(load_path, param_key)
        report = load_into(self.get_bare_model(net), checkpoint, strict=strict)
        get_root_logger().info(f'Loading weights from {load_path}, key {checkpoint.param_key}: {"; ".join(report)}')
