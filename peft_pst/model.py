"""`PSTModel`: puts the layers in, and moves the sparsity of all of them along the schedule."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn

from .callers import users_level
from .embedding import PSTEmbeddingUpdate, check_embedding, training_embeddings
from .group_selection import couple
from .hosts import HostPlaces, PSTHost, PSTMultiheadAttention
from .kinds import check_parameter, kind_of
from .layer import PSTLayer
from .loading import (
    adapted_modules,
    check_stored_adapter,
    check_unmerged,
    in_present_places,
    note_whether_pruned,
    updated_embeddings,
)
from .nesting import check_not_nested, mark_pruned
from .plan import LayerPlan, ScheduleStatus
from .quantised import PSTQuantisedLinear, backend_of, dequantise_the_rest
from .schedule import cubic_sparsity
from .taking_back import taken_back_if_it_fails
from .targets import find_block_linears, find_token_embeddings
from .ties import shared_weights
from .tuner_layer import PSTTunerLayer
from .units import Unit, units


class PSTModel(BaseTuner):
    """Parameter-efficient sparse training of a model's linear layers.

    Normally made by `peft.get_peft_model(model, PSTConfig(...))`. The base stays frozen; each adapted matrix gets a
    low-rank update, a low-rank and a structured importance, and a mask with an exact number of zeros.

    Args:
        model: the base model, any `nn.Module`.
        peft_config: a `PSTConfig`, or a dict of them by adapter name.
        adapter_name: name of the adapter, "default" by convention.
        low_cpu_mem_usage: create the adapter's tensors on the meta device, to be filled by a state dict.

    Source: Li et al. 2022 (arXiv 2205.11005).

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> model = get_peft_model(base, PSTConfig(target_modules=["0"], target_sparsity=0.5, r=2, score_rank=2))
        >>> [round(model.update_sparsity(step, total_steps=10), 3) for step in (0, 5, 10)]
        [0.0, 0.469, 0.5]
        >>> pruned = model.merge_and_unload()
        >>> int((pruned[0].weight == 0).sum())
        16
    """

    prefix = "pst_"
    tuner_layer_cls = PSTTunerLayer
    # Found from the structure of the model instead, see `find_block_linears`.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with training_embeddings():
            return super().forward(*args, **kwargs)

    def update_sparsity(self, step: int, total_steps: int | None = None) -> float:
        """Put the schedule's sparsity after `step` finished optimizer steps in force; see `update_sparsity`."""
        return update_sparsity(self.model, step, total_steps)

    # AdaLoRA's and AdaMSS's name for the same, which training loops written for PEFT already call.
    update_and_allocate = update_sparsity

    def get_sparsity(self) -> float:
        """Fraction of zeros now in force over all adapted weights of the active adapters; see `get_sparsity`."""
        return get_sparsity(self.model)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None:
            targets = find_block_linears(self.model) if self._named is None else sorted(self._named)
            if not targets and not peft_config.target_parameters:
                raise ValueError(
                    "Please specify `target_modules` in `peft_config`: this model has no linear layers inside numbered "
                    'blocks. Pass a list of names, a regular expression, or "all-linear".'
                )
            peft_config.target_modules = {
                name for name in targets if not _is_named(name, peft_config.embedding_modules or ())
            }
            if peft_config.embedding_modules is None and peft_config.embedding_r and peft_config.r:
                found = find_token_embeddings(self.model)
                peft_config.embedding_modules = [name for name in found if not self._is_closed(peft_config, name)]
        self._check_embedding_names(peft_config)
        return peft_config

    def _is_closed(self, peft_config: Any, name: str) -> bool:
        """Whether a module is excluded, or trained in full, which PEFT says by an object of its own."""
        found = super()._check_target_module_exists(peft_config, name)
        return not isinstance(found, bool | re.Match | None)

    def _check_embedding_names(self, peft_config: Any) -> None:
        names = peft_config.embedding_modules or ()
        for name in [name for name, _ in self.model.named_modules() if _is_named(name, names)]:
            if self._is_closed(peft_config, name):
                fields = [field for field in ("exclude_modules", "modules_to_save") if getattr(peft_config, field)]
                other, what = " or ".join(fields), "which leaves it out"
            elif super()._check_target_module_exists(peft_config, name):
                other, what = "target_modules", "which prunes it"
            else:
                continue
            raise ValueError(
                f"{name} is named in embedding_modules, which updates it and leaves it dense, and in {other}, {what}; "
                "name it in one of them."
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            self._adapt_parameter(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)
            return
        if _is_named(current_key, peft_config.embedding_modules or ()):
            self._update_embedding(peft_config, adapter_name, target, target_name, parent, current_key)
            return
        if isinstance(target, PSTLayer):
            target.update_layer(adapter_name, peft_config, self._status)
            return
        backend = None if isinstance(target, BaseTunerLayer) else backend_of(self.model, target)
        kind = kind_of(target, parent, current_key, backend)
        for name in ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            _check_untied(self._shared.get((target, name)), current_key, "Adapting")
        if issubclass(kind, PSTMultiheadAttention):
            attention = cast("PSTMultiheadAttention", self._host_of(target, kind, parent, target_name, current_key))
            attention.adapt_all(adapter_name, peft_config, self._status)
            return
        options = {} if backend is None else {"backend": backend}
        new_module = kind(target, adapter_name, peft_config, self._status, current_key, **options)
        if adapter_name not in self.active_adapters:
            # A further adapter is not trainable until it is activated.
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _update_embedding(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, key: str
    ) -> None:
        if isinstance(target, PSTEmbeddingUpdate):
            target.update_layer(adapter_name, peft_config)
            return
        check_embedding(target, key)
        _check_untied(self._shared.get((target, "weight")), key, "Adapting", is_updated=True)
        new_module = PSTEmbeddingUpdate(cast("nn.Embedding", target), adapter_name, peft_config, key)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _adapt_parameter(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        parameter_path: str,
        parameter_name: str,
    ) -> None:
        check_parameter(target, parameter_name, parameter_path)
        _check_untied(self._shared.get((target, parameter_name)), parameter_path, "Adapting")
        name = parameter_path.removesuffix(f".{parameter_name}")
        host = self._host_of(target, PSTHost, parent, target_name, name)
        host.adapt(parameter_name, adapter_name, peft_config, self._status)

    def _host_of(
        self, target: nn.Module, kind: type[PSTHost], parent: nn.Module, target_name: str, module_name: str
    ) -> PSTHost:
        host = self._hosts.of(target) or kind(target, module_name)
        self._hosts.add(parent, target_name, host)
        return host

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper | PSTHost) or isinstance(new_module, PSTTunerLayer):
            # A module saved in full, or unloaded, takes its place as it is. PEFT would read its weight, which a head of
            # several layers, such as RoBERTa's, does not have, nor a module that holds several matrices. An adapted
            # layer is on its device already; PEFT would move it to that of the weight, which is none where it is
            # offloaded.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        # The one object that all layers of the adapter now being injected share.
        self._status = ScheduleStatus()
        self._shared = shared_weights(model)
        self._hosts = HostPlaces(model)
        config: Any = self.peft_config[adapter_name]
        trains = {parameter: parameter.requires_grad for host in self._hosts for parameter in host.parameters()}
        with self._unregistered_if_it_fails(model, adapter_name), taken_back_if_it_fails(model):
            check_not_nested(model, adapter_name)
            _check_saved_in_full(model, config.modules_to_save or ())
            with warnings.catch_warnings(), self._hosts.aside():
                # PEFT knows no parameters by name; `_warn_about_unmatched_patterns` looks after this pattern too.
                warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
                super().inject_adapter(
                    model,
                    adapter_name,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    state_dict=self._as_named(model, config, state_dict),
                )
            for host in self._hosts:
                host.put_in_force(self.active_adapters, inference_mode=config.inference_mode)
            for parameter, requires_grad in trains.items():
                parameter.requires_grad_(requires_grad)
            _prepare_selection(model, adapter_name)
        names = {name for layer in pst_layers(model) if adapter_name in layer.pst_plans for name in layer.pattern_names}
        _warn_about_unmatched_patterns(config, names)
        updates = [module.module_name for module in model.modules() if isinstance(module, PSTEmbeddingUpdate)]
        _warn_about_unmatched_embeddings(config, updates)

    @contextmanager
    def _unregistered_if_it_fails(self, model: nn.Module, adapter_name: str) -> Iterator[None]:
        """Forget the configuration, which PEFT has entered among the model's before, also in the place of another."""
        try:
            yield
        except Exception:
            del self.peft_config[adapter_name]
            for layer in pst_layers(model):
                if adapter_name in layer.pst_plans:
                    self.peft_config[adapter_name] = layer.pst_plans[adapter_name].config
            raise

    def _as_named(
        self, model: nn.Module, config: Any, state_dict: dict[str, Tensor] | None
    ) -> dict[str, Tensor] | None:
        """The keys from which PEFT reads the modules that a state dict names."""
        self._named: set[str] | None = None
        if state_dict is None or config.target_parameters:  # which PEFT refuses itself
            return state_dict
        self._named = adapted_modules(model, state_dict)
        if config.embedding_modules is None:
            config.embedding_modules = updated_embeddings(state_dict)
        return {f"{name}.{self.prefix}": torch.empty(0) for name in self._named}

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]  # PEFT's is static
        found = super()._check_target_module_exists(peft_config, key)
        # What is excluded stays so, and has been refused if it is named.
        return _is_named(key, peft_config.embedding_modules or ()) if found is None or found is False else found

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """PEFT warns by name of layers that may be tied; those that are are refused by identity when adapted."""

    def _check_merge_allowed(self) -> None:
        shared = shared_weights(self.model)
        for layer in pst_layers(self.model):
            places = shared.get((layer.get_base_layer(), layer.stored_name))
            _check_untied(places, layer.module_name, "Merging")
        for module in self.model.modules():
            if isinstance(module, PSTEmbeddingUpdate):
                places = shared.get((module.get_base_layer(), "weight"))
                _check_untied(places, module.module_name, "Merging", is_updated=True)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge, and return the base model without adapters, as PEFT's other tuners do.

        Args:
            progressbar: whether to show progress.
            safe_merge: whether to look for NaN and infinity first.
            adapter_names: the adapters to merge; by default those now active.
            dequantize: whether to make a quantised model dense: all of its quantised layers, adapted or not.

        Returns:
            The base model, with exact zeros where the adapters prune.
        """
        if dequantize:
            self._check_merge_allowed()
            for layer in pst_layers(self.model):
                if isinstance(layer, PSTQuantisedLinear):
                    layer.merge_dense(safe_merge, adapter_names)
        merged = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        if dequantize:
            dequantise_the_rest(merged)
        return merged

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in self.model.modules():
            if isinstance(layer, PSTTunerLayer):
                layer.keep_adapters_at_hand()  # PEFT dispatches a model anew right before, if it was dispatched
                if not autocast_adapter_dtype:
                    layer.lower_adapter(adapter_name)
        # PEFT puts new parameters in the place of half-precision ones, and forgets which of them were frozen.
        trains = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trains[name])

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_known(adapter_names)
        self._try_merging(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge=safe_merge)

    def _try_merging(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Have every layer refuse before any has changed; one after another, so that no second copy is held."""
        self._check_merge_allowed()
        for layer in self.model.modules():
            may_refuse = safe_merge or isinstance(layer, PSTQuantisedLinear)  # whose grid may have no zero
            if isinstance(layer, PSTTunerLayer) and may_refuse and not layer.merged:
                layer.merge(safe_merge, adapter_names)
                if layer.merged:
                    layer.unmerge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        self._check_known(adapter_names)
        if merge:
            self._try_merging(adapter_names, safe_merge)
        pruned = list(self._bases_to_prune(adapter_names or self.active_adapters if merge else ()))
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for base_layer in pruned:
            mark_pruned(base_layer)
        return model

    def _bases_to_prune(self, adapter_names: Sequence[str]) -> Iterator[nn.Module]:
        """The base layers in which these adapters, or those merged already, leave zeros."""
        for layer in pst_layers(self.model):
            present = [name for name in {*adapter_names, *layer.merged_adapters} if name in layer.pst_plans]
            if any(layer.get_num_pruned(name) for name in present):
                yield layer.get_base_layer()

    def _check_known(self, adapter_names: Sequence[str] | None) -> None:
        # PEFT merges nothing for a name that it does not know, and says nothing.
        unknown = sorted(set(adapter_names or ()) - set(self.peft_config))
        if unknown and not isinstance(adapter_names, str):
            raise ValueError(f"There are no adapters {unknown} to merge; the model has {sorted(self.peft_config)}.")

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        kept = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:
            # Each layer has chosen among those that it has itself, and PEFT asks the first layer alone.
            self.set_adapter(kept or next(iter(self.peft_config)))

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of masked weights has the zeros of none of them.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "PST adapters have no weighted sum: each has a mask of its own, and a sum of masked weights is zero only "
            "where all of them are. Activate several instead, model.base_model.set_adapter([...]): their updates add "
            "up, and a weight is zero where any of them prunes."
        )

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        empty = [name for name, tensor in found.items() if not tensor.numel()]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(found)} tensors of adapter {adapter_name!r} are empty, such as {min(empty)}, "
                "because DeepSpeed ZeRO-3 keeps a part of each on every process. Save with Trainer.save_model(), or "
                "pass save_pretrained(..., state_dict=accelerator.get_state_dict(model)), which gather them."
            )
        _undo_merging_of_embeddings(model, state_dict)
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_unmerged(model, adapter_name)
        state_dict = in_present_places(model, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers_with: defaultdict[str, set[str]] = defaultdict(set)
        for key in remapped:
            layer, _, part = key.removesuffix(f".{adapter_name}").rpartition(".")
            layers_with[part].add(layer)
        adapted = set().union(*(layers_with[part] for part in PSTLayer.adapter_layer_names))
        _check_complete(
            adapted - layers_with["pst_num_pruned"],
            "pst_num_pruned, the number of zeros,",
            "at which sparsity it was saved is not known",
        )
        _check_complete(
            layers_with["pst_S"] - layers_with["pst_positions"],
            "pst_positions, the places of the residual pst_S,",
            "which weights it belongs to is not known",
        )
        check_stored_adapter(model, adapter_name, remapped)
        note_whether_pruned(model, adapter_name, remapped)
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # Without this method PEFT would ignore `model(x, adapter_names=[...])` silently.
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "PST cannot mix adapters within a batch (adapter_names=[...]): each adapter has its own masked weight, "
                "so the batch would need one product per adapter. Call set_adapter() and run one batch per adapter."
            )
        with training_embeddings():
            yield


def _prepare_selection(model: nn.Module, adapter_name: str) -> None:
    """Once all layers are there: see which are selected together and whether they can be, and start them."""
    layers = {layer.module_name: layer for layer in pst_layers(model) if adapter_name in layer.pst_plans}
    if not layers:
        if any(isinstance(module, PSTEmbeddingUpdate) for module in model.modules()):
            raise ValueError(
                "No layer is left to prune, only embeddings to update; mend target_modules or exclude_modules, or use "
                "LoRA, which prunes nothing."
            )
        return  # PEFT says so
    couple(model, adapter_name, layers)
    plans = {name: layer.pst_plans[adapter_name] for name, layer in layers.items()}
    for unit in units((layers[name], adapter_name, plan.target_sparsity) for name, plan in plans.items()):
        unit.check()
    has_data = all(layer.has_data(adapter_name) for layer in layers.values())
    coupled = [(layers[name], adapter_name, plan.sparsity_at_start) for name, plan in plans.items() if plan.groups]
    for unit in units(coupled):
        if has_data and unit.sparsity:
            for layer, name, change in unit.prepare():
                layer.put_in_force(name, change)


def _is_named(module_name: str, names: Collection[str]) -> bool:
    """Whether a module is one of those named by the ends of their names, as in `target_modules`."""
    return any(f".{module_name}".endswith(f".{name}") for name in names)


def _check_saved_in_full(model: nn.Module, names: Collection[str]) -> None:
    """Refuse to train in full what another adapter is on, before PEFT does without saying why."""
    for name, module in model.named_modules():
        if isinstance(module, PSTTunerLayer) and name.endswith(tuple(names)):  # as PEFT looks for them
            adapters = sorted(module._get_available_adapters())
            raise ValueError(
                f"Module {name} is named in modules_to_save, but adapters {adapters} of this model are on it, and a "
                "module that is trained in full cannot carry one; take it out of modules_to_save, or delete the "
                "adapters first."
            )


def _undo_merging_of_embeddings(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Put the dense weights of merged embeddings and output layers into what a model's adapter is saved from.

    PEFT takes the base's weights from there too, where they are adapted or the vocabulary was resized. Of a merged one
    they would be masked and updated once more when the file is loaded.
    """
    ends = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):
            ends.append(getattr(model, get)())
    for name, module in model.named_modules():
        if isinstance(module, PSTTunerLayer) and any(module is end for end in ends):
            dense = {f"{name}.{key}": tensor for key, tensor in module.dense_state().items()}
            state_dict.update({key: tensor for key, tensor in dense.items() if key in state_dict})


def _check_complete(layers: set[str], missing: str, consequence: str) -> None:
    if layers:
        raise ValueError(
            f"The adapter's tensors lack {missing} for {len(layers)} layers, such as {min(layers)}; {consequence}. "
            "Save it again with save_pretrained()."
        )


def _check_untied(places: list[str] | None, name: str, occasion: str, *, is_updated: bool = False) -> None:
    if not places:
        return
    if is_updated:
        effect, rest = "an update would change all of them", "embedding_modules, or set embedding_r=0"
    else:
        effect, rest = "a mask would prune all of them", "target_modules"
    raise ValueError(
        f"{occasion} {name} is refused: {' and '.join(places)} are one tensor, or have parts of one in common, so "
        f"{effect}. Untie them before adapting (model.config.tie_word_embeddings = False; "
        f"other.weight = torch.nn.Parameter(other.weight.detach().clone())), or leave the module out of {rest}."
    )


def pst_layers(model: nn.Module) -> Iterator[PSTLayer]:
    """The layers that carry PST adapters, in the order of the model."""
    return (module for module in model.modules() if isinstance(module, PSTLayer))


def update_sparsity(model: nn.Module, step: int, total_steps: int | None = None) -> float:
    """Put the schedule's sparsity after `step` finished optimizer steps in force, for all active PST adapters.

    For hand-written training loops, after each `optimizer.step()`; `PSTCallback` does it in a `Trainer`. Works on a
    `PeftModel` as on a model with injected adapters.

    Args:
        model: a model with PST adapters.
        step: finished optimizer steps (not micro-batches), at least 0.
        total_steps: optimizer steps of the whole run; by default the configuration's `total_steps`.

    Returns:
        The sparsity now in force, over all adapted weights, in [0, 1).

    Raises:
        ValueError: if the model has no active PST adapter, `total_steps` is given nowhere, or `step` is negative.
        RuntimeError: if an adapter is merged.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> model = get_peft_model(base, PSTConfig(target_modules=["0"], target_sparsity=0.5))
        >>> update_sparsity(model, step=10, total_steps=10)
        0.5
    """
    planned = []
    for layer, name in active_adapters(model):
        layer.check_unmerged(name)
        layer.check_bounded(name)
        planned.append((layer, name, _scheduled_sparsity(layer.pst_plans[name], step, total_steps)))
    due = [unit for unit in units(planned) if _selection_is_due(unit, step)]
    prepared = [change for unit in due for change in unit.prepare()]
    # All or nothing: whatever may be refused has been by now.
    for layer, name, change in prepared:
        layer.put_in_force(name, change)
    for layer, name, _ in planned:
        layer.pst_plans[name].status.moved = True
    for module in model.modules():
        if isinstance(module, PSTEmbeddingUpdate):
            module.warn_if_left_out()
    return get_sparsity(model)


def _selection_is_due(unit: Unit, step: int) -> bool:
    interval = unit.plan.config.mask_interval
    if interval is None:
        # Whatever was pruned before, in an earlier run or at once, is held.
        return unit.in_force < unit.reach.start
    # The target is reached on time whatever the interval, or a short run would end below it.
    return step % interval == 0 or (unit.sparsity == unit.plan.target_sparsity and unit.in_force not in unit.reach)


def _scheduled_sparsity(plan: LayerPlan, step: int, total_steps: int | None) -> float:
    config = plan.config
    total = config.total_steps if total_steps is None else total_steps
    if total is None:
        raise ValueError(
            "total_steps is not known, so the schedule has no length: pass update_sparsity(step, total_steps), set "
            "PSTConfig(total_steps=...), or train with PSTCallback, which takes it from the Trainer."
        )
    return cubic_sparsity(
        step,
        total,
        target_sparsity=plan.target_sparsity,
        initial_sparsity=min(config.initial_sparsity, plan.target_sparsity),  # some stay dense
        warmup_ratio=config.warmup_ratio,
        cooldown_ratio=config.cooldown_ratio,
    )


def get_sparsity(model: nn.Module) -> float:
    """Fraction of zeros now in force over all adapted weights of the active PST adapters, in [0, 1).

    Raises:
        ValueError: if the model has no active PST adapter.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_pst import PSTConfig
        >>> config = PSTConfig(target_modules=["0"], initial_sparsity=0.25)
        >>> get_sparsity(get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), config))
        0.25
    """
    pairs = active_adapters(model)
    return sum(layer.get_num_pruned(name) for layer, name in pairs) / sum(layer.num_weights for layer, _ in pairs)


def active_adapters(model: nn.Module) -> list[tuple[PSTLayer, str]]:
    """Every layer with each adapter that is active on it.

    Raises:
        ValueError: if there is none.
    """
    pairs = [(layer, name) for layer in pst_layers(model) for name in layer.active_adapters if name in layer.pst_plans]
    if not pairs:
        raise ValueError(
            "The model has no active PST adapter. Make one with get_peft_model(model, PSTConfig(...)), or activate one "
            "with set_adapter()."
        )
    return pairs


def _warn_about_unmatched_patterns(config: Any, module_names: Collection[str]) -> None:
    for field in ("sparsity_pattern", "parts", "rank_pattern", "residual_pattern", "score_rank_pattern"):
        unmatched = [
            key
            for key in getattr(config, field)
            if not any(get_pattern_key([key], name) == key for name in module_names)
        ]
        if unmatched:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: {sorted(unmatched)}.",
                RuntimeWarning,
                stacklevel=users_level(),
            )


def _warn_about_unmatched_embeddings(config: Any, updated: Collection[str]) -> None:
    unmatched = [key for key in config.embedding_modules or () if not any(_is_named(name, [key]) for name in updated)]
    if unmatched:
        warnings.warn(
            f"The following embedding_modules did not match any module and were ignored: {sorted(unmatched)}.",
            RuntimeWarning,
            stacklevel=users_level(),
        )
