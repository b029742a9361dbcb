"""A trained encoder as a function of texts, wherever the encoder comes from: a run, an exported or a Hugging Face folder.

    model = contrastive_jax.load("runs/debug")
    queries = model.encode_query(["what is a contrastive loss?"])
    documents = model.encode_document(["A loss over pairs.", "A cake."])
    model.similarity(queries, documents)

`runtime.model_name` lists the names that `load` takes. Dimensions: n, m texts or rows, l tokens of a row, e embedding.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from contrastive_jax import files
from contrastive_jax.config import UserError, default_config, load_run_config
from contrastive_jax.config.dense import vector_size
from contrastive_jax.data import prepared
from contrastive_jax.data import tokenizer as tokenizer_lib
from contrastive_jax.huggingface import folder as folder_lib
from contrastive_jax.inference import batching, hosts
from contrastive_jax.inference.forward import Forward, make_forward
from contrastive_jax.inference.tokenize import AnyTokenizer, FolderTokenize, RunTokenize, Tokenize, TruncationCount
from contrastive_jax.models import encoder as encoder_lib
from contrastive_jax.runtime import digest, layout, sharding
from contrastive_jax.runtime.model_name import ModelName, parse_model_name, read_params
from contrastive_jax.runtime.progress import Progress
from contrastive_jax.runtime.randomness import step_key

PRECISIONS = ("float32", "bfloat16", "int8")
PRECISION_HELP = (
    "Type of the factors of matrix products; which is fastest, the machine decides. Default: as the model was trained."
)


@dataclasses.dataclass(frozen=True)
class TextModel:
    """An encoder with its tokenizer.

    Attributes:
      name: the workdir, or "hf:FOLDER".
      model_config: values of `config.model` of the encoder.
      encoder: the encoder in JAX; `apply` is its function.
      params: the encoder's parameters, spread over the devices by `sharding.RULES`.
      forward_with: (params, tokens int32[n l], mask bool[n l]) → unit vectors float32[n e] on the host.
      tokenize_views: tokenizes texts of a view.
      config: of the training run; None for a folder.
      step: of the checkpoint; None for an exported or Hugging Face folder.
      truncation: counts the texts that were encoded, and those that were truncated.
      pooling: a value of `config.model.pooling`.
      prompts: how a text's view is marked: the text put before each view, a note on delimiters, or "none".
      max_tokens: the longest text in tokens.
    """

    name: str
    model_config: ConfigDict
    encoder: encoder_lib.Encoder
    params: Any
    forward_with: Forward
    tokenize_views: Tokenize
    config: ConfigDict | None = None
    step: int | None = None
    truncation: TruncationCount = dataclasses.field(default_factory=TruncationCount)

    @property
    def apply(self) -> Callable[..., jax.Array]:
        """The encoder's function in JAX: (params, tokens, mask, rng=None) → [n e]; dropout where a random key is given."""
        return self.encoder.apply

    @property
    def pooling(self) -> str:
        """How token states become one vector: a value of `config.model.pooling`."""
        return self.model_config.pooling

    @property
    def precision(self) -> str:
        """The type of the factors of matrix products, one of PRECISIONS."""
        model = self.model_config
        return model.dtype if model.products == "float32" else model.products

    @property
    def dim(self) -> int:
        """The size e of the vectors."""
        return vector_size(self.model_config)

    @property
    def max_tokens(self) -> int:
        """The longest text in tokens, delimiters or special tokens included; the rest of a longer one is cut off."""
        return self.tokenize_views.max_tokens

    @property
    def prompts(self) -> str | Mapping[str, str]:
        """How a text's view is marked: the text put before each view, a note on delimiters, or "none"."""
        return self.tokenize_views.prompts

    @property
    def tokenizer(self) -> AnyTokenizer:
        """The tokenizer; a run's is loaded on first use.

        Raises:
          UserError: neither the workdir nor the run's data has one.
        """
        return self.tokenize_views.tokenizer

    @functools.cached_property
    def parameters_digest(self) -> str:
        """A hash of the parameters, equal on any mesh."""
        return digest.combine_hashes(digest.hash_tree(self.params))

    def protocol(self) -> dict[str, Any]:
        """Returns everything that determines the embeddings, to be stored with every result.

        The first call hashes the parameters. The key "step" is absent for an exported or Hugging Face folder.
        """
        leaves_out = any(self.tokenize_views.prompt_tokens(view) for view in self.tokenize_views.views)
        default = self.tokenize_views.default_prompt
        return (
            {"model": self.name}
            | ({} if self.step is None else {"step": self.step})
            | ({"include_prompt": False} if leaves_out else {})
            | ({"default_prompt": default} if default else {})
            | ({} if self.precision == "float32" else {"precision": self.precision})
            | {
                "pooling": self.pooling,
                "prompts": self.prompts,
                "max_tokens": self.max_tokens,
                "normalised": True,
                "parameters": self.parameters_digest,
                "code": digest.hash_code(),
            }
        )

    def forward(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Encodes rows of token ids int32[n l] with mask bool[n l] to unit vectors float32[n e]."""
        return self.forward_with(self.params, tokens, mask)

    def tokenize(self, texts: Sequence[str], view: str = "query") -> list[list[int]]:
        """Returns the token ids of n texts as the encoder takes them: truncated, with delimiters or special tokens."""
        return self.tokenize_views(texts, view).rows

    def encode(self, texts: Sequence[str], view: str = "query", progress: Progress | None = None) -> np.ndarray:
        """Encodes texts.

        Args:
          texts: n texts; each is stripped, and truncated to `max_tokens`.
          view: "query" or "document", which models without delimiters or prompts encode alike; the name of another prompt that
            the model's folder has; or `tokenize.NO_SIDE`, for texts on no side: of a run, queries; of a folder, as
            sentence-transformers' `encode` takes them, with the folder's default prompt or none.
          progress: counts the texts; None: a line is logged every few seconds.

        Returns:
          float32[n e], unit vectors.
        """
        if isinstance(texts, str):
            raise TypeError(f"texts={texts!r}: give a list of texts")
        if view not in self.tokenize_views.views:
            raise ValueError(f"view={view!r}: choose one of {', '.join(self.tokenize_views.views)}")
        if len(texts) == 0:
            return np.zeros((0, self.dim), np.float32)
        tokenized = hosts.tokenize_together(self.tokenize_views, texts, view)
        self.truncation.add(tokenized.truncated)
        return self.encode_rows(tokenized.rows, view, progress)

    def encode_rows(self, rows: Sequence[Sequence[int]], view: str = "query", progress: Progress | None = None) -> np.ndarray:
        """Encodes n rows of token ids, from `tokenize` with this view, to unit vectors float32[n e]."""
        prompt_tokens = self.tokenize_views.prompt_tokens(view)

        def forward(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
            """As a joined row: the prompt is part 2, and the vector that of part 1."""
            in_prompt = mask & (np.arange(mask.shape[1]) < prompt_tokens)
            return self.forward(tokens, mask + in_prompt.astype(np.int32))

        limits = batching.device_limits(jax.default_backend()).times(jax.device_count())
        with contextlib.ExitStack() as stack:
            if progress is None:
                progress = stack.enter_context(Progress(f"encoding ({view})", len(rows), "texts", quiet_if_short=True))
            shortest = self.max_tokens if encoder_lib.pads_rows(self.model_config) else 0
            return batching.embed_ragged(
                forward if prompt_tokens else self.forward, rows, self.max_tokens, limits, progress.advance, shortest
            )

    def encode_query(self, texts: Sequence[str]) -> np.ndarray:
        """Encodes n queries to unit vectors float32[n e]."""
        return self.encode(texts, "query")

    def encode_document(self, texts: Sequence[str]) -> np.ndarray:
        """Encodes n documents to unit vectors float32[n e]."""
        return self.encode(texts, "document")

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Returns the cosines float32[n m] of vectors a[n e] and b[m e]; a prefix of each vector may be given (Matryoshka)."""
        a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
        return a @ b.T

    def untrained(self) -> "TextModel | None":
        """Returns the same model with the initial, random weights of its run.

        None for a folder, whose initial weights nobody knows, and for a run that began with another model's (`init_from`).
        """
        if self.config is None or self.config.init_from:
            return None
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        rng = step_key(jax.random.key(self.config.seed), "init", jnp.int32(0))
        initial = jax.jit(self.encoder.init, out_shardings=shardings)(rng)
        return dataclasses.replace(self, params=initial, step=0, truncation=TruncationCount())


def load(name: str, max_tokens: int | None = None, precision: str | None = None) -> TextModel:
    """Loads a model.

        model = load("runs/debug@best")

    Args:
      name: a workdir, WORKDIR@STEP, WORKDIR@best, an exported folder, or hf:FOLDER; each local, on gs:// or on s3://.
      max_tokens: the longest text in tokens; None: as long as the model says (config.model.max_length of a run). Learned
        positions have an end; bags of embeddings and rotary positions take any length.
      precision: one of PRECISIONS; None: as the model was trained, and float32 of a folder.

    Raises:
      UserError: there is no such model, or it has fewer positions than `max_tokens`; the message says what to give.
    """
    parsed = parse_model_name(name)
    return load_run(parsed, max_tokens, precision) if parsed.is_run else load_folder(parsed.folder, max_tokens, precision)


def set_precision(model_config: ConfigDict, precision: str | None) -> None:
    """Sets the types with which a model computes: of its products alone on CPU, elsewhere of its activations too.

    On CPU, activations in bfloat16 save nothing.

    Args:
      model_config: `config.model`, which is changed.
      precision: see `load`.
    """
    if precision:
        model_config.products = precision
        model_config.dtype = "float32" if precision == "float32" or jax.default_backend() == "cpu" else "bfloat16"


def load_run(name: ModelName, max_tokens: int | None = None, precision: str | None = None) -> TextModel:
    """Loads a checkpoint of a training run; see `load`."""
    workdir = name.folder
    config = load_run_config(workdir)
    set_precision(config.model, precision)
    step, all_params = read_params(name, functools.partial(shardings_on_all_devices, config.model))
    params = all_params["encoder"]
    encoder, forward_with = make_encoder_on_all_devices(config.model, params)
    return TextModel(
        name=str(workdir),
        model_config=config.model,
        encoder=encoder,
        params=params,
        forward_with=forward_with,
        tokenize_views=make_run_tokenize(
            config, lambda: load_tokenizer(workdir, config), max_tokens, files.read_json(workdir / prepared.PROMPTS)
        ),
        config=config,
        step=step,
    )


def load_folder(folder: epath.PathLike, max_tokens: int | None = None, precision: str | None = None) -> TextModel:
    """Loads a Hugging Face or sentence-transformers folder; see `load`.

    Args:
      folder: the folder, local or on a bucket.
      max_tokens: the longest text in tokens, a longer one is truncated; None: the limit that the folder's files state.
      precision: see `load`.

    Raises:
      UserError: the folder has no such model, or the model has fewer learned positions than `max_tokens`.
    """
    modules = folder_lib.read_modules(folder)
    imported = folder_lib.read_model(modules)
    positions = imported.length  # rows of the table of learned positions; None: there is no table
    settings = folder_lib.read_text_settings(modules, positions)
    limit = choose_max_tokens(f"hf:{folder}", max_tokens, settings.max_tokens, positions)
    model_config = default_config().model
    # Plain attention takes rows of any length on every device; the kernels do not.
    # A prompt that is not pooled is the second part of a joined row (`TextModel.encode_rows`): each part sees the other.
    model_config.update({"max_length": settings.max_tokens} | imported.model, attention="plain", part_mask="full")
    set_precision(model_config, precision)
    encoder, forward_with = make_encoder_on_all_devices(model_config, imported.params, joined=not modules.include_prompt)
    return TextModel(
        name=f"hf:{folder}",
        model_config=model_config,
        encoder=encoder,
        params=place_on_all_devices(model_config, imported.params),
        forward_with=forward_with,
        tokenize_views=FolderTokenize(
            file=settings.tokenizer,
            max_tokens=limit,
            prompts=settings.prompts or "none",
            default_prompt=settings.default_prompt,
            include_prompt=modules.include_prompt,
            lower_case=settings.lower_case,
            special_tokens=not modules.is_bag,
            split_special_tokens=settings.split_special_tokens,
        ),
    )


def choose_max_tokens(name: str, wanted: int | None, default: int, positions: int | None) -> int:
    """Returns the longest text in tokens that a model shall read.

    Args:
      name: of the model, for the message.
      wanted: what the user asks for, or None.
      default: what the model says.
      positions: how many positions the model has; None: it takes any length.

    Raises:
      UserError: fewer positions than wanted.
    """
    if wanted is not None and positions is not None and wanted > positions:
        raise UserError(f"--max_tokens={wanted}: {name} has positions for {positions} tokens; lower it")
    return default if wanted is None else wanted


def make_run_tokenize(
    config: ConfigDict,
    load: Callable[[], AnyTokenizer],
    max_tokens: int | None = None,
    prompts: Mapping[str, str] | None = None,
) -> RunTokenize:
    """Makes the tokenization of a run's texts.

    Args:
      config: of the run.
      load: loads the tokenizer, on first use.
      max_tokens: see `load`.
      prompts: see `RunTokenize`.

    Raises:
      UserError: the model has fewer positions than `max_tokens`.
    """
    model = config.model
    limit = choose_max_tokens("the run", max_tokens, model.max_length, encoder_lib.longest_row(model))
    return RunTokenize(load, config.data.delimiters, limit, prompts or {})


def load_tokenizer(workdir: epath.Path, config: ConfigDict) -> AnyTokenizer:
    """Loads the tokenizer of a run: the copy in its workdir, else the one in the folder of its data.

    The copy lets a run be loaded where its data are not present.

    Args:
      workdir: of the run.
      config: of the run.

    Raises:
      UserError: neither folder has a tokenizer.
    """
    return tokenizer_lib.load(workdir if tokenizer_lib.find(workdir) else prepared.folders(config.data.dir)[0])


def make_encoder_on_all_devices(config: ConfigDict, params: Any, joined: bool = False) -> tuple[encoder_lib.Encoder, Forward]:
    """Makes the encoder of a `config.model` and its jitted forward pass on all devices.

    Args:
      config: `config.model`.
      params: the encoder's parameters, or their shapes; the number of rows of the embedding table is taken from them.
      joined: as in `encoder.Encoder.apply`: the mask of the forward pass may have tokens of a part 2, which are not pooled.
    """
    mesh = sharding.all_devices_mesh()
    encoder = encoder_lib.make_encoder(config, params["transformer"]["embedding"].shape[0], layout.on_mesh(mesh))
    return encoder, make_forward(functools.partial(encoder.apply, joined=joined), mesh)


def shardings_on_all_devices(config: ConfigDict, params: Any) -> Any:
    """Returns the shardings of an encoder's parameters (or of their shapes) on the mesh of all devices."""
    encoder, _ = make_encoder_on_all_devices(config, params)
    return sharding.dividing_shardings(encoder.axes, params, sharding.all_devices_mesh())


def place_on_all_devices(config: ConfigDict, params: Any) -> Any:
    """Spreads the parameters of an encoder, host arrays, over all devices."""
    return sharding.place(params, shardings_on_all_devices(config, params))
