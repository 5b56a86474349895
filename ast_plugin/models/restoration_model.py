"""The model that `model_type: RestorationModel` names: BasicSR's SRModel with what restoration needs besides."""

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
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
    """Train and test a network that restores images: `lq` in, something near `gt` out.

    Beyond SRModel: any number of losses (every option of `train` that ends in `_opt`), the schedules of
    `models.optimizers`, images of any size in validation, the input's metrics beside the result's, the best weights
    kept beside the latest, weights files read safely and written whole.

    Option keys, beside SRModel's: those of `train` that `TrainingStep`, `Precision`, `Mixup` and
    `network_switches.apply` document; `val.protocol`, how images are restored and measured, see
    `evaluation.protocols`; and `val.best_metric`, the metric of `val.metrics` that picks the best weights (the first by
    default): `models/net_g_best.pth` and, with the network's options in the metadata, `net_g_best.safetensors`.

    Args:
        opt: the options as BasicSR prepares them; changed in place, as BasicSR's models do: `build_model` hands a copy.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        self.recorded = run_state.record(opt) if opt['is_train'] else {}
        self.progress: TrainingProgress | None = None
        self.processes = Processes()
        self.validator = Validator.from_options(opt, self._image_path, self.processes)
        self.validated_at: dict[str, int] = {}  # by dataset: iteration of the last validation
        self.notes: set[str] = set()  # on memory, each logged once
        self.log_dict: Mapping[str, float] = {}
        self.run_log = RunLog.from_options(opt, self.processes.rank)
        # Parts of the run that a training state holds, each by its state_dict and load_state_dict.
        self.stateful: dict[str, Any] = {'run_log': self.run_log}
        self.iteration = self.saved_at = self.trained_at = 0
        opt['path'].setdefault('param_key_g', None)  # which SRModel would take for params
        super().__init__(opt)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Switch on what training asks of the network, move it, wrap it for parallel training."""
        return super().model_to_device(network_switches.apply(net, self.opt['train']) if self.is_train else net)

    def init_training_settings(self) -> None:
        """Build losses, moving average, optimiser, schedule, and the step that uses them."""
        self.net_g.train()
        if self.device.type == 'cpu':
            keep_freed_memory()
        train_opt = self.opt['train']
        self.ema_decay = train_opt.get('ema_decay') or 0
        if self.ema_decay > 0:
            self.net_g_ema = deepcopy(self.get_bare_model(self.net_g)).eval().requires_grad_(False)
            path = self.opt['path']
            if path.get('pretrain_network_g') is not None:
                key = path['param_key_g'] if path['param_key_g'] != 'params' else None  # the average where there is one
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
        if precision.scaler.is_enabled():
            self.stateful['scaler'] = precision.scaler

    def setup_schedulers(self) -> None:
        """Build our schedules by name, all others as BasicSR does."""
        ours = [optimizers.build_schedule(optimizer, self.opt['train']) for optimizer in self.optimizers]
        if None in ours:
            super().setup_schedulers()
        else:
            self.schedulers += ours

    @master_only
    def print_network(self, net: nn.Module) -> None:
        """Name the network and count its parameters; its structure would fill screens."""
        net = self.get_bare_model(net)
        count = sum(parameter.numel() for parameter in net.parameters())
        get_root_logger().info(f'Network: {type(net).__name__}, with parameters: {count:,d}')

    def update_learning_rate(self, current_iter: int, warmup_iter: int = -1) -> None:
        """Before each iteration: step the schedules, then BasicSR's linear warm-up over what they say.

        Raises:
            RunStopped: see `leave_if_asked`.
        """
        self.leave_if_asked()
        self.iteration = current_iter
        for scheduler in self.schedulers:
            optimizers.restore_rates(scheduler)
        super().update_learning_rate(current_iter, warmup_iter)

    def feed_data(self, data: Mapping[str, Any]) -> None:
        """Take a batch, and the names of its images for messages; what is of 8 bits becomes float on the device."""
        # Out of pinned memory the processor need not wait for the copy.
        self.lq = to_unit_range(data['lq'].to(self.device, non_blocking=True))
        self.__dict__.pop('gt', None)  # of the batch before: images to restore may have none
        if 'gt' in data:
            self.gt = to_unit_range(data['gt'].to(self.device, non_blocking=True))
        self.images = list(data.get('lq_path', ()))

    def optimize_parameters(self, current_iter: int) -> None:
        """Make a step on the batch last fed; without effect where its numbers are not finite and that is skipped."""
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
        """Move the averaged weights towards the present ones."""
        training_step.update_average(self.net_g_ema, self.get_bare_model(self.net_g), decay)

    def _pause(self, is_over: bool = False) -> None:
        """Something else than a step has taken its time; the moment to draw what has been logged."""
        self.run_log.draw(at_once=is_over)
        if self.progress is not None:
            self.progress.pause()

    @property
    def evaluated_network(self) -> nn.Module:
        """The network that is tested and released: the moving average where there is one."""
        return self.net_g_ema if hasattr(self, 'net_g_ema') else self.get_bare_model(self.net_g)

    def test(self) -> None:
        """Restore the images last fed, of any size, as the protocol says."""
        with network_switches.eager_blocks():
            self.output = self.validator.protocol.restore(self.evaluated_network, self.lq, on_note=self._note)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.add(note)
            get_root_logger().info(note)

    def dist_validation(self, dataloader: DataLoader, current_iter: int | str, tb_logger: Any, save_img: bool) -> None:
        """Validate among processes: each restores its share, all know the results, the first writes them down."""
        self.nondist_validation(dataloader, current_iter, tb_logger, save_img)
        self.processes.wait()  # for the first one's writing, under more patience than the next step would have

    def nondist_validation(
        self, dataloader: DataLoader, current_iter: int | str, tb_logger: Any, save_img: bool
    ) -> None:
        """Restore and measure a dataset; log the means, and in training keep the weights if they are the best.

        Raises:
            DataError: if the dataset is empty.
        """
        name = dataloader.dataset.opt['name']
        if len(dataloader) == 0:
            raise DataError(f'the validation set {name} holds no images')
        if self.is_train:
            # BasicSR validates once more after the last iteration, and has counted past it by then
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
                self._note(f'{name} is restored, not measured: it holds no gt')
            return
        self.metric_results = results.mean()
        if not self.is_train:
            self._write_results(results)
            return
        self._initialize_best_metric_results(name)
        metric = self.opt['val'].get('best_metric') or next(iter(self.metric_results))
        best, value = self.best_metric_results[name][metric], self.metric_results[metric]
        improved = value > best['val'] if best['better'] == 'higher' else value < best['val']
        for each, mean in self.metric_results.items():
            self._update_best_metric_result(name, each, mean, current_iter)
        self._log_validation_metric_values(current_iter, name, tb_logger)
        self.run_log.add_validation(current_iter, name, self.metric_results)
        if improved and name == next(iter(self.best_metric_results)):  # of several datasets the first decides
            self.save_best()
        if self.progress is not None:
            self.progress.best = f'best {metric} {self.best_metric_results[name][metric]["val"]:.2f}'

    def measure(
        self, dataloader: DataLoader, current_iter: int | str = '', save_img: bool = False
    ) -> ValidationResults:
        """Restore a dataset image by image, with the metrics of `val.metrics` before and after."""
        with frozen_weights():
            return self.validator.measure(self._restore, dataloader, current_iter, save_img)

    def _restore(self, sample: dict[str, Any]) -> Mapping[str, Tensor]:
        if self.is_train and self.processes.count == 1:  # several do not keep step here
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
            say(f'The worst and the best images: {sheet}')

    def _initialize_best_metric_results(self, dataset_name: str) -> None:
        """BasicSR's, and for metrics that were added since the run began, which a resumed state knows nothing of."""
        super()._initialize_best_metric_results(dataset_name)
        known = self.best_metric_results[dataset_name]
        for metric, options in self.opt['val']['metrics'].items():
            better = options.get('better', 'higher')
            known.setdefault(metric, {'better': better, 'val': inf if better == 'lower' else -inf, 'iter': -1})

    @master_only
    def save_best(self) -> None:
        """Write the present weights as the best, for BasicSR and, self-describing, as safetensors."""
        folder = Path(self.opt['path']['models'])
        save_torch(folder / 'net_g_best.pth', self.weights())
        network, given = self.evaluated_network, self.opt['network_g']
        starts = getattr(network, 'transient_options', ())  # say where training began, not what the network is
        options = {key: value for key, value in given.items() if key not in starts}
        save_weights(folder / 'net_g_best.safetensors', network.state_dict(), options)

    def save(self, epoch: int, current_iter: int) -> None:
        """Write weights and training state, each whole or not at all, and then delete those that are too old.

        At the end of a run, for which BasicSR gives -1, the last iteration is saved: a longer run goes on from it.
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
        """Return the network's weights, and their moving average where there is one, by the keys of BasicSR's files."""
        networks = {'params': self.get_bare_model(self.net_g), 'params_ema': getattr(self, 'net_g_ema', None)}
        return {
            key: {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
            for key, network in networks.items()
            if network is not None
        }

    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """Write all that the run is, see `run_state`; older states go when this one has been read back whole."""
        state = run_state.collect(self, epoch, current_iter)
        if self.processes.rank == 0:
            folder = Path(self.opt['path']['training_states'])
            save_torch(folder / STATE.format(current_iter), state)
            read_state(folder / STATE.format(current_iter))
            keep_newest(folder, STATE, current_iter, self._num_kept())
        self.saved_at = current_iter

    def _num_kept(self) -> int:
        return (self.opt.get('logger') or {}).get('keep_checkpoints') or 3

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Take up everything where a state left it, and validate if the killed run would have done so next.

        Args:
            resume_state: its `epoch` becomes the one of the next iteration, should epochs be longer or shorter now.
        """
        run_state.restore(self, resume_state, self.recorded)
        self.iteration = self.saved_at = iteration = resume_state['iter']
        iters_per_epoch = self.opt['train'].get('iters_per_epoch')
        if iters_per_epoch:
            resume_state['epoch'], _ = epoch_of(iteration, iters_per_epoch)
        val = self.opt.get('val') or {}
        if val.get('val_freq') and iteration % val['val_freq'] == 0:  # BasicSR saves before, and knows no outcome
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

    def validation(
        self, dataloader: DataLoader, current_iter: int | str, tb_logger: Any, save_img: bool = False
    ) -> None:
        """Validate without touching the random numbers that training goes on with."""
        with randomness.preserved():
            super().validation(dataloader, current_iter, tb_logger, save_img)
        self._pause(is_over=self.is_train and current_iter > self.opt['train']['total_iter'])

    def leave_if_asked(self) -> None:
        """Save and end the run between two iterations if a signal has asked any of its processes to.

        Raises:
            RunStopped: then.
            SystemExit: where another process has failed, which says why.
        """
        number = self._ask_all(received_signal() or 0)
        if not number:
            return
        if self.iteration:
            self._save_iteration()
        if number == FAILED:
            follow()
        if self.progress is not None:
            self.progress.bar.close()
        self.processes.wait()  # whoever left before the first one has written would have it ended by the launcher
        raise RunStopped(number, self.iteration)

    def save_unsaved(self, is_loading: bool) -> int:
        """Save what was trained since the last state, for an error that ends the run between two iterations.

        Args:
            is_loading: whether it came while a batch was awaited: then other processes save as well, when they ask
                one another before the next iteration, see `leave_if_asked`.
        Returns:
            The iteration that is saved; 0 if none is: within an iteration, or where other processes are not in step.
        """
        if not self.is_train or not 0 < self.trained_at == self.iteration:
            return 0
        if self.processes.count > 1:
            if not is_loading or self.iteration >= self.opt['train']['total_iter']:
                return 0
            self._ask_all(FAILED)
        self._save_iteration()
        return self.iteration

    def _ask_all(self, number: int) -> int:
        """The greatest number that any process gives; all of them call this together."""
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
        """Load weights: official, BasicSR's or safetensors, without running anything that lies in them.

        Raises:
            CheckpointError: if the file cannot be used; says why.
        """
        checkpoint = read_checkpoint(load_path, param_key)
        report = load_into(self.get_bare_model(net), checkpoint, strict=strict)
        get_root_logger().info(f'Loading weights from {load_path}, key {checkpoint.param_key}: {"; ".join(report)}')
