"""Turns a checkpoint into a prepared model folder, once; imports torch and transformers while it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helixnet.core.errors import CorruptCheckpoint, HelixError, ModelError
from helixnet.core.model import DTYPE_BYTES, ChatFormat, Manifest
from helixnet.engine.weights import architecture, keeping
from helixnet.engine.weights.prepared import (
    FileStamp,
    GgufIndex,
    GgufTensor,
    PreparedModel,
    SourceRecord,
    Wanted,
    gguf_types,
    read_prepared,
    write_prepared,
)


@dataclass(frozen=True, slots=True)
class Ingredients:
    """Everything a manifest is made of, whatever the checkpoint's format."""

    name: str
    config: dict[str, Any]
    dtype: str
    tokenizer_json: str
    chat: ChatFormat
    source_format: str
    config_sha256: str
    tokenizer_sha256: str
    weights_sha256: str
    quantization: str = ""
    sizes: tuple[int, int, int] | None = None
    """As `architecture.sizes` gives them, if the checkpoint came quantized."""


def assemble(folder: Path, parts: Ingredients, model_class: Any, model: Any, record: SourceRecord) -> PreparedModel:
    """Write the prepared folder for a skeleton `model` of `model_class` and read it back."""
    if parts.dtype not in DTYPE_BYTES:
        raise ModelError(f"a model is served as {', '.join(DTYPE_BYTES)}, not {parts.dtype!r}; pass --dtype")
    config = model.config
    forms = keeping.forms(architecture.layer_linears(model), parts.quantization, gguf_types(record))
    layer_bytes, embedding_bytes, head_bytes = parts.sizes or architecture.sizes(model, parts.dtype, forms)
    kv_heads, head_dim = architecture.kv_shape(config, model_class.__name__)
    manifest = Manifest(
        name=parts.name,
        architecture=model_class.__name__,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        context_tokens=config.max_position_embeddings,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=parts.dtype,
        layer_bytes=layer_bytes,
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        source_format=parts.source_format,
        config_sha256=parts.config_sha256,
        tokenizer_sha256=parts.tokenizer_sha256,
        weights_sha256=parts.weights_sha256,
        quantization=parts.quantization,
    )
    plain = config.to_dict()
    for volatile in ("transformers_version", "_attn_implementation", "torch_dtype", "dtype", "_name_or_path"):
        plain.pop(volatile, None)
    model = PreparedModel(folder=folder, manifest=manifest, config=plain, chat=parts.chat, record=record)
    write_prepared(model, parts.tokenizer_json)
    return read_prepared(folder)


def prepare_gguf(folder: Path, name: str, stamp: FileStamp, wanted: Wanted) -> PreparedModel:
    """Prepare the GGUF file that `stamp` describes. Raises CorruptCheckpoint if it makes no sense."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path, dtype = Path(stamp.path), wanted.dtype or "float32"
    try:
        parsed = load_gguf_checkpoint(str(path))
        model_class, config = architecture.causal_class(dict(parsed["config"]))
        model = architecture.build_skeleton(model_class, config, dtype, "eager")
        index = _gguf_index(path, model, parsed["config"])
        tokenizer_json, chat = _gguf_tokenizer(path)
    except HelixError:
        raise
    except Exception as error:  # a stranger's bytes break the reader in any way they like
        raise CorruptCheckpoint(f"{path} is damaged or not a GGUF file this version can read ({error})") from error
    parts = Ingredients(
        name=name,
        config=dict(parsed["config"]),
        dtype=dtype,
        tokenizer_json=tokenizer_json,
        chat=chat,
        source_format="gguf",
        # Config and tokenizer are parts of the hashed file; what transformers derives from them may differ by version.
        config_sha256=stamp.sha256,
        tokenizer_sha256=stamp.sha256,
        weights_sha256=stamp.sha256,
        quantization=wanted.quantization,
    )
    record = SourceRecord(format="gguf", modeling_module=model_class.__module__, files=(stamp,), gguf=index)
    return assemble(folder, parts, model_class, model, record)


def _gguf_index(path: Path, model: Any, config: dict[str, Any]) -> GgufIndex:
    """Where each parameter of `model` lies in the file; checks that none is missing and none is cut off."""
    from transformers.integrations.gguf import GgufHeader
    from transformers.integrations.gguf.reader import load_gguf_state_dict
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    header = GgufHeader.from_file(str(path))
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config)
    targets: dict[str, str] = get_gguf_hf_weights_map(model, processor)
    stored = load_gguf_state_dict(header)
    size = path.stat().st_size
    tensors = []
    for info in header.tensors:
        if header.data_start + info.offset + info.nbytes > size:
            raise CorruptCheckpoint(f"{path} ends before {info.name}; it is cut short, fetch it again")
        if info.name in targets:
            tensors.append(
                GgufTensor(
                    name=info.name,
                    offset=header.data_start + info.offset,
                    bytes=info.nbytes,
                    type=info.ggml_type,
                    stored_shape=tuple(stored[info.name].shape),
                    shape=info.shape,
                    target=targets[info.name],
                )
            )
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {tensor.target for tensor in tensors}
    _refuse_missing(path, [key for key in shapes if key not in found], model)
    heads = {key: config[key] for key in config if key.startswith(("num_", "n_", "hidden_size"))}
    return GgufIndex(
        architecture=header.architecture,
        tensors=tuple(tensors),
        shapes={key: shape for key, shape in shapes.items() if key in found},
        config={key: value for key, value in heads.items() if isinstance(value, int)},
    )


def _refuse_missing(path: Path, missing: Sequence[str], model: Any) -> None:
    """A tied head is not stored; anything else that is not there makes the checkpoint unusable."""
    tied = {
        name
        for name, value in model.state_dict(keep_vars=True).items()
        if architecture.is_tied(model) and value is model.get_input_embeddings().weight
    }
    lost = [name for name in missing if name not in tied]
    if lost:
        raise CorruptCheckpoint(f"{path} lacks {len(lost)} tensors of its architecture, {lost[0]} among them")


def _gguf_tokenizer(path: Path) -> tuple[str, ChatFormat]:
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer, read_gguf_metadata

    architecture_name, tokenizer_fields, settings = get_gguf_tokenizer(str(path))
    tokenizer, _ = convert_gguf_tokenizer(architecture_name, tokenizer_fields)
    metadata, _ = read_gguf_metadata(str(path))
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    stops = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    chat = ChatFormat(
        template=settings.get("chat_template"),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_ids=() if eos is None else (eos,),
        stop_ids=tuple(sorted({stop for stop in stops if stop is not None})),
        special_tokens={key: value for key, value in settings.items() if key.endswith("_token") and value},
    )
    return tokenizer.to_str(), chat
