"""tmforge in Python: the call shape of LMDeploy's pipeline over libtmforge, in one file without dependencies.

    from tmforge import pipeline, TurbomindEngineConfig, GenerationConfig

    pipe = pipeline("workspace", backend_config=TurbomindEngineConfig(cache_max_entry_count=0.4, quant_policy=8))
    for response in pipe(["Hi", [{"role": "user", "content": "What is 17 + 25?"}]],
                         gen_config=GenerationConfig(max_new_tokens=64)):
        print(response.text, response.generate_token_len, response.finish_reason)
    for piece in pipe.stream_infer("Tell me a story"):
        print(piece.text, end="", flush=True)
    session = pipe.chat("What is 17 + 25?")
    print(pipe.chat("And 3 + 4?", session).response.text)

The library is looked for as TMFORGE_LIBRARY names it, beside this file, then where the system keeps libraries. What
is computed, is computed there: this file turns Python values into its structs and back.
"""
import ctypes as C
import ctypes.util
import dataclasses
import json
import os
import typing

__all__ = ["pipeline", "Pipeline", "Session", "TurbomindEngineConfig", "GenerationConfig", "ChatTemplateConfig", "Response",
           "TmforgeError", "version"]


class TmforgeError(RuntimeError):
    """What the library refused or could not do; `code` is a tmf_status."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


# ---- the structs of tmforge.h ----
LOG = C.CFUNCTYPE(None, C.c_void_p, C.c_int, C.c_char_p)


class Error(C.Structure):
    _fields_ = [("code", C.c_int32), ("message", C.c_char * 512)]


class Options(C.Structure):
    _fields_ = [("size", C.c_size_t), ("device", C.c_char_p), ("chat_template", C.c_char_p),
                ("cache_max_entry_count", C.c_double), ("cache_bytes", C.c_int64), ("quant_policy", C.c_int32),
                ("session_len", C.c_int32), ("max_batch", C.c_int32), ("prefill_tokens", C.c_int32),
                ("prefix_cache", C.c_int32), ("threads", C.c_int32), ("deterministic", C.c_int32),
                ("log_level", C.c_int32), ("log", LOG), ("log_ud", C.c_void_p)]


class Info(C.Structure):
    _fields_ = [("size", C.c_size_t), ("session_len", C.c_int32), ("max_batch", C.c_int32), ("vocab", C.c_int32),
                ("kv_bits", C.c_int32), ("weight_bits", C.c_int32), ("bos_id", C.c_int32), ("eos_id", C.c_int32),
                ("architecture", C.c_char_p), ("device", C.c_char_p), ("chat_template", C.c_char_p)]


class GenOptions(C.Structure):
    _fields_ = [("size", C.c_size_t), ("max_new_tokens", C.c_int32), ("min_new_tokens", C.c_int32),
                ("temperature", C.c_double), ("top_p", C.c_double), ("min_p", C.c_double),
                ("repetition_penalty", C.c_double), ("presence_penalty", C.c_double),
                ("frequency_penalty", C.c_double), ("top_k", C.c_int32), ("ignore_eos", C.c_int32),
                ("seed", C.c_uint64), ("stop_texts", C.POINTER(C.c_char_p)), ("stop_ids", C.POINTER(C.c_int32)),
                ("n_stop_texts", C.c_int32), ("n_stop_ids", C.c_int32), ("keep_special", C.c_int32),
                ("logprobs", C.c_int32), ("json_schema", C.c_char_p), ("regex", C.c_char_p)]


class Prompt(C.Structure):
    _fields_ = [("ids", C.POINTER(C.c_int32)), ("n_ids", C.c_size_t), ("options", C.POINTER(GenOptions))]


class Piece(C.Structure):
    _fields_ = [("size", C.c_size_t), ("index", C.c_int32), ("finish", C.c_int32), ("left", C.c_int32),
                ("n_ids", C.c_int32), ("text", C.c_char_p), ("n_text", C.c_size_t), ("ids", C.POINTER(C.c_int32)),
                ("logprobs", C.POINTER(C.c_float)), ("n_prompt", C.c_int32), ("n_cached", C.c_int32),
                ("n_new", C.c_int32), ("preemptions", C.c_int32), ("queue_s", C.c_double),
                ("prefill_s", C.c_double), ("decode_s", C.c_double), ("error", Error)]


E_LIMIT = 9
PARSE_SPECIAL, ADD_BOS, KEEP_SPECIAL = 2, 1, 4
FINISH = {1: "stop", 2: "length", 3: "abort", 4: "error"}


def _load():
    here = os.path.dirname(os.path.abspath(__file__))
    names = [os.environ.get("TMFORGE_LIBRARY"), os.path.join(here, "libtmforge.so"),
             ctypes.util.find_library("tmforge")]
    for name in names[:1] if names[0] else [n for n in names[1:] if n and (os.path.exists(n) or "/" not in n)]:
        return C.CDLL(name)
    raise OSError("libtmforge.so is not beside tmforge.py nor in the system: TMFORGE_LIBRARY names its path")


def _declare(lib):
    model, text, size = C.c_void_p, C.c_char_p, C.c_size_t
    error, ids, count = C.POINTER(Error), C.POINTER(C.c_int32), C.POINTER(C.c_size_t)
    for name, result, args in (
            ("tmf_version", text, []), ("tmf_options_init", None, [C.POINTER(Options), size]),
            ("tmf_open", C.c_int, [C.POINTER(model), text, C.POINTER(Options), error]),
            ("tmf_close", None, [C.POINTER(model)]), ("tmf_info_get", None, [model, C.POINTER(Info), size]),
            ("tmf_encode", C.c_int, [model, text, size, C.c_int, ids, size, count, error]),
            ("tmf_decode", C.c_int, [model, ids, size, C.c_int, text, size, count, error]),
            ("tmf_chat_encode", C.c_int, [model, text, size, C.c_int, ids, size, count, error]),
            ("tmf_chat_render", C.c_int, [model, text, size, C.c_int, text, size, count, error]),
            ("tmf_gen_options_init", None, [C.POINTER(GenOptions), size]),
            ("tmf_batch_open", C.c_int, [C.POINTER(model), model, C.POINTER(Prompt), size, error]),
            ("tmf_batch_next", C.c_int, [model, C.c_int, C.POINTER(Piece), error]),
            ("tmf_score", C.c_int, [model, C.POINTER(Prompt), size, C.POINTER(C.c_double), error]),
            ("tmf_batch_cancel", None, [model, C.c_int32]), ("tmf_batch_close", None, [C.POINTER(model)])):
        f = getattr(lib, name)
        f.restype, f.argtypes = result, args
    return lib


_lib = _declare(_load())


def version():
    return _lib.tmf_version().decode()


def _check(code, error):
    if code:
        raise TmforgeError(code, error.message.decode("utf-8", "replace"))


# ---- configurations: LMDeploy's names ----
@dataclasses.dataclass
class TurbomindEngineConfig:
    """Fields of LMDeploy that have no meaning here (rope_scaling_factor, download_dir, ...) are not among them:
    positions stand in the model's directory, and nothing is downloaded."""
    model_format: typing.Optional[str] = None  # has no effect: the directory says it
    dtype: str = "auto"  # likewise
    session_len: typing.Optional[int] = None
    max_batch_size: int = 32
    cache_max_entry_count: float = 0.8
    cache_bytes: int = 0  # instead of a share
    quant_policy: int = 0
    enable_prefix_caching: bool = True
    max_prefill_token_num: int = 512
    tp: int = 1
    device: str = "cpu"  # or "cuda", "cuda:1"
    threads: int = 0
    deterministic: bool = False


@dataclasses.dataclass
class ChatTemplateConfig:
    model_name: typing.Optional[str] = None  # a template's name, or the path of a file


@dataclasses.dataclass
class GenerationConfig:
    max_new_tokens: int = 512
    min_new_tokens: int = 0
    do_sample: bool = True  # False is temperature 0
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    random_seed: typing.Optional[int] = None
    ignore_eos: bool = False
    stop_words: typing.Optional[typing.List[str]] = None
    stop_token_ids: typing.Optional[typing.List[int]] = None
    skip_special_tokens: bool = True
    logprobs: typing.Optional[int] = None  # not None: Response.logprobs, of the chosen tokens
    response_format: typing.Optional[dict] = None  # {"type": "json_schema", "json_schema": {..}}, "regex_schema"


@dataclasses.dataclass
class Response:
    text: str = ""
    generate_token_len: int = 0
    input_token_len: int = 0
    finish_reason: typing.Optional[str] = None  # "stop", "length", "abort", "error"; None: it goes on
    token_ids: typing.List[int] = dataclasses.field(default_factory=list)
    logprobs: typing.Optional[typing.List[float]] = None
    index: int = 0
    cached_token_len: int = 0
    error: typing.Optional[str] = None


def _schema(format_):
    """(json_schema, regex) of a response_format."""
    kind = (format_ or {}).get("type", "text")
    if kind == "json_schema":
        schema = format_["json_schema"]
        return json.dumps(schema.get("schema", schema)).encode(), None
    if kind == "json_object":
        return b'{"type": "object"}', None
    if kind in ("regex_schema", "regex"):
        return None, format_.get("regex_schema", format_.get("regex", "")).encode()
    if kind == "text":
        return None, None
    raise ValueError(f"response_format: unknown type {kind!r}")


def _gen_options(g, index):
    o = GenOptions()
    _lib.tmf_gen_options_init(C.byref(o), C.sizeof(o))
    words = [w.encode() for w in g.stop_words or []]
    stops = list(g.stop_token_ids or [])
    o.max_new_tokens, o.min_new_tokens = g.max_new_tokens, g.min_new_tokens or 0
    o.temperature, o.top_p, o.top_k = g.temperature if g.do_sample else 0.0, g.top_p, g.top_k
    o.min_p, o.repetition_penalty = g.min_p, g.repetition_penalty
    o.presence_penalty, o.frequency_penalty = g.presence_penalty, g.frequency_penalty
    o.ignore_eos, o.keep_special, o.logprobs = g.ignore_eos, not g.skip_special_tokens, g.logprobs is not None
    seed = int.from_bytes(os.urandom(8), "little") if g.random_seed is None else g.random_seed + index
    o.seed = seed & 0xFFFFFFFFFFFFFFFF
    o.stop_texts, o.n_stop_texts = (C.c_char_p * len(words))(*words), len(words)
    o.stop_ids, o.n_stop_ids = (C.c_int32 * len(stops))(*stops), len(stops)
    o.json_schema, o.regex = _schema(g.response_format)
    return o


class Session:
    """A conversation of Pipeline.chat: what was said, and the last Response."""

    def __init__(self, pipe, session_id):
        self.id, self.history, self.response, self.generator = session_id, [], None, None
        self._pipe = pipe

    def messages(self, prompt):
        """All of it as a conversation, with what is said next."""
        said = [{"role": role, "content": text} for pair in self.history for role, text in zip(("user", "assistant"), pair)]
        return said + [{"role": "user", "content": prompt}]

    def close(self):
        """Forgotten; its id begins a new one."""
        self.history, self.response, self.generator = [], None, None
        self._pipe.sessions.pop(self.id, None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        return "\n".join(f"USER:\n{user}\nASSISTANT:\n{answer}\n" for user, answer in self.history)


class Pipeline:
    def __init__(self, model_path, backend_config=None, chat_template_config=None, log_level=None):
        b = backend_config or TurbomindEngineConfig()
        if b.tp != 1:
            raise ValueError(f"tp: expected 1, got {b.tp}: one device is used")
        o, error = Options(), Error()
        _lib.tmf_options_init(C.byref(o), C.sizeof(o))
        o.device, o.threads, o.deterministic = b.device.encode(), b.threads, b.deterministic
        o.cache_max_entry_count, o.cache_bytes, o.quant_policy = b.cache_max_entry_count, b.cache_bytes, b.quant_policy
        o.session_len, o.max_batch = b.session_len or 0, b.max_batch_size
        o.prefill_tokens, o.prefix_cache = b.max_prefill_token_num, b.enable_prefix_caching
        if chat_template_config and chat_template_config.model_name:
            o.chat_template = chat_template_config.model_name.encode()
        if callable(log_level):  # called with (level, line)
            self._log = LOG(lambda _, level, line: log_level(level, line.decode("utf-8", "replace")))
            o.log, o.log_level = self._log, 2
        self.sessions = {}  # by id
        self._model = C.c_void_p()
        _check(_lib.tmf_open(C.byref(self._model), os.fsencode(model_path), C.byref(o), C.byref(error)), error)
        info = Info()
        _lib.tmf_info_get(self._model, C.byref(info), C.sizeof(info))
        self.info = {name: v.decode() if isinstance(v := getattr(info, name), bytes) else v
                     for name, _ in Info._fields_ if name != "size"}

    def close(self):
        if getattr(self, "_model", None):
            _lib.tmf_close(C.byref(self._model))
            self._model = None

    __del__ = close

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # ---- texts and ids ----
    def _filled(self, call, text, flags, kind):
        error, n, out = Error(), C.c_size_t(), kind(0)
        for _ in range(2):  # the second time with room for all
            _check(call(self._model, text, len(text), flags, out, len(out), C.byref(n), C.byref(error)), error)
            if n.value < len(out) or n.value == 0:
                break
            out = kind(n.value + 1)
        return out, n.value

    def encode(self, text, add_bos=True, parse_special=False):
        flags = (ADD_BOS if add_bos else 0) | (PARSE_SPECIAL if parse_special else 0)
        ids, n = self._filled(_lib.tmf_encode, text.encode(), flags, lambda k: (C.c_int32 * k)())
        return ids[:n]

    def decode(self, ids, skip_special_tokens=True):
        array, flags = (C.c_int32 * len(ids))(*ids), 0 if skip_special_tokens else KEEP_SPECIAL
        call = lambda model, _, count, *rest: _lib.tmf_decode(model, array, len(ids), *rest)
        text, n = self._filled(call, b"", flags, C.create_string_buffer)
        return text.raw[:n].decode("utf-8", "replace")

    def apply_chat_template(self, messages):
        text, n = self._filled(_lib.tmf_chat_render, json.dumps(messages).encode(), 0, C.create_string_buffer)
        return text.raw[:n].decode("utf-8", "replace")

    def _ids(self, prompt, do_preprocess):
        """A text is a user's message (do_preprocess=False: itself), a list of messages a conversation, a list of
        numbers ids."""
        if isinstance(prompt, str):
            if not do_preprocess:
                return self.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        elif prompt and isinstance(prompt[0], int):
            return prompt
        ids, n = self._filled(_lib.tmf_chat_encode, json.dumps(prompt).encode(), 0, lambda k: (C.c_int32 * k)())
        return ids[:n]

    # ---- answers ----
    def stream_infer(self, prompts, gen_config=None, do_preprocess=True):
        """Responses that each bring what is new: text and token_ids since the last of their index. The last one of an
        index has a finish_reason."""
        prompts = [prompts] if not _is_batch(prompts) else prompts
        configs = gen_config if isinstance(gen_config, list) else [gen_config or GenerationConfig()] * len(prompts)
        if len(configs) != len(prompts):
            raise ValueError(f"gen_config: expected {len(prompts)} of them, got {len(configs)}")
        kept = []  # what the structs point to
        rows = (Prompt * max(1, len(prompts)))()
        for i, (prompt, config) in enumerate(zip(prompts, configs)):
            ids, options = self._ids(prompt, do_preprocess), _gen_options(config, i)
            array = (C.c_int32 * len(ids))(*ids)
            kept.append((array, options))
            rows[i] = Prompt(C.cast(array, C.POINTER(C.c_int32)), len(ids), C.pointer(options))
        batch, error, total = C.c_void_p(), Error(), [0] * len(prompts)
        _check(_lib.tmf_batch_open(C.byref(batch), self._model, rows, len(prompts), C.byref(error)), error)
        try:
            left, p = len(prompts), Piece(size=C.sizeof(Piece))
            while left:
                _check(_lib.tmf_batch_next(batch, 500, C.byref(p), C.byref(error)), error)
                left = p.left
                if p.index >= 0:
                    total[p.index] += p.n_ids
                    yield Response(C.string_at(p.text, p.n_text).decode(), total[p.index], len(kept[p.index][0]),
                                   FINISH.get(p.finish), p.ids[:p.n_ids] if p.n_ids else [],
                                   p.logprobs[:p.n_ids] if p.logprobs else None, p.index, p.n_cached,
                                   p.error.message.decode("utf-8", "replace") if p.finish == 4 else None)
        finally:
            _lib.tmf_batch_close(C.byref(batch))

    def __call__(self, prompts, gen_config=None, do_preprocess=True):
        """A Response for a prompt, a list of them for a list."""
        batch = _is_batch(prompts)
        out = [Response(index=i) for i in range(len(prompts) if batch else 1)]
        for piece in self.stream_infer(prompts, gen_config, do_preprocess):
            r = out[piece.index]
            r.text += piece.text
            r.token_ids += piece.token_ids
            r.logprobs = (r.logprobs or []) + piece.logprobs if piece.logprobs is not None else r.logprobs
            r.generate_token_len, r.input_token_len = piece.generate_token_len, piece.input_token_len
            r.finish_reason, r.cached_token_len, r.error = piece.finish_reason, piece.cached_token_len, piece.error
        return out if batch else out[0]

    infer = batch_infer = __call__

    # ---- conversations ----
    def session(self, session_id=None):
        """The conversation with this id, a new one when there is none."""
        if session_id is None:
            session_id = max((i for i in self.sessions if isinstance(i, int)), default=0) + 1
        return self.sessions.setdefault(session_id, Session(self, session_id))

    def _say(self, session, prompt, gen_config):
        total = Response()
        for piece in self.stream_infer([session.messages(prompt)], gen_config):
            total = dataclasses.replace(piece, text=total.text + piece.text, token_ids=total.token_ids + piece.token_ids)
            yield piece
        session.response = total
        if total.finish_reason != "error":
            session.history.append((prompt, total.text))

    def chat(self, prompt, session=None, gen_config=None, stream_response=False):
        """The next turn of a session (an id, a Session, or None: a new one), which is returned: the answer is its
        `response`. stream_response: the pieces are its `generator`, and the turn counts when that is through."""
        if not isinstance(session, Session):
            session = self.session(session)
        session.generator = self._say(session, prompt, gen_config)
        if not stream_response:
            for _ in session.generator:
                pass
            session.generator = None
        return session

    # ---- likelihoods ----
    def get_ppl(self, input_ids):
        """For one list of ids or several: the mean negative log-likelihood (LMDeploy's get_ppl; its exponential is the
        perplexity)."""
        many = [input_ids] if input_ids and isinstance(input_ids[0], int) else input_ids
        kept = [(C.c_int32 * len(ids))(*ids) for ids in many]
        rows = (Prompt * max(1, len(many)))(*[Prompt(C.cast(a, C.POINTER(C.c_int32)), len(a)) for a in kept])
        nll, error = (C.c_double * max(1, len(many)))(), Error()
        _check(_lib.tmf_score(self._model, rows, len(many), nll, C.byref(error)), error)
        return nll[:len(many)]


def _is_batch(prompts):
    """["a", "b"], [[{"role": ..}], ..] and [[1, 2], ..] are batches; "a", [{"role": ..}] and [1, 2] one prompt."""
    return not isinstance(prompts, str) and not (prompts and isinstance(prompts[0], (dict, int)))


def pipeline(model_path, model_name=None, backend_config=None, chat_template_config=None, log_level=None):
    """model_name: a chat template's name, as with early LMDeploy. log_level: a function of (level, line); names of
    levels have no effect, the library prints nothing."""
    if model_name and not chat_template_config:
        chat_template_config = ChatTemplateConfig(model_name)
    return Pipeline(model_path, backend_config, chat_template_config, log_level)
