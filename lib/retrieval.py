"""Search: BM25 over products and passages, and the retriever of Search-QA as a client and as a server.

BM25 has the constants of Anserini (k1 0.9, b 0.4) and Lucene's idf, with an analyser of our own. The protocol is that
of Search-R1's retrieval server: POST /retrieve.
"""
import base64
import email.utils
import functools
import http.client
import http.server
import io
import ipaddress
import json
import re
import socket
import ssl
import sys
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np

from lib.official import nfc, read_jsonl
from lib.program import without_secrets

HITS = 50                                # results of a WebShop search, as in the original
RETRIEVER_TIMEOUT = 60.0                 # seconds for one search, tries and pauses included
RETRIEVER_TRIES = 3                      # on a refused connection, a time-out or a status of 429 or 500 and above
RETRIEVER_PAUSE = 1.0                    # seconds before the second try, twice as many before the third
RETRY_AFTER_LIMIT = 10.0                 # seconds that a server can make a try wait
ANSWER_LIMIT = 1 << 24                   # bytes of a server's answer
REQUEST_LIMIT = 1 << 20                  # bytes of a request that the server reads

STOP_WORDS = frozenset({
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of",
    "on", "or", "s", "such", "t", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will",
    "with"})


# ---------------------------------------------------------------------------------------------------------------------
# BM25
# ---------------------------------------------------------------------------------------------------------------------

HAN = "\u3005-\u3007\u3041-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"   # and Hiragana


@functools.cache
def word_pattern():
    """What a word is beyond ASCII, as in Lucene's StandardTokenizer: Han and Hiragana one by one, others in runs.

    Combining marks and joiners belong to the letter before them; \\w has neither. The table takes 0.1 s, once.
    """
    marks = "".join(map(chr, (code for code in range(0x300, sys.maxunicode + 1)
                              if unicodedata.category(chr(code))[0] == "M"))) + "\u200c\u200d"
    return re.compile(f"[{HAN}]|[^\\W_{HAN}](?:[^\\W_{HAN}]|[{marks}])*")


def search_terms(text):
    """Lower-cased alphanumeric words without stop words; a plural "s" is cut, so that "lamps" finds "lamp".

    Equal texts in different Unicode forms give equal terms (NFC); Han characters are terms of their own.
    """
    text = text.lower()
    found = (re.findall(r"[^\W_]+", text) if text.isascii()
             else word_pattern().findall(nfc(text)))
    words = (word for word in found if word not in STOP_WORDS)
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words]


class Postings(NamedTuple):
    """An inverted index: per term the documents that hold it and what it adds to their scores.

    Term number t has the entries starts[t] to starts[t + 1] of `documents` and `weights`. The arrays of a stored index
    are memory-mapped, so that a search reads only what it needs.
    """
    ids: np.ndarray                      # document number -> identifier
    terms: dict                          # term -> its number
    starts: np.ndarray                   # [number of terms + 1] int64
    documents: np.ndarray                # [entries] int32, ascending within a term
    weights: np.ndarray                  # [entries] fp32


def build_postings(ids, texts, *, k1=0.9, b=0.4):
    """The `Postings` of `texts` under `ids`, with Lucene's idf, ln(1 + (N - df + 0.5) / (df + 0.5)).

    texts may be an iterator: no more than one is held, and 20 bytes or so for each of its different terms.
    """
    terms, numbers, counts, sizes, lengths = {}, array("i"), array("i"), array("i"), array("i")
    for text in texts:
        found = Counter(search_terms(text))
        numbers.extend([terms.setdefault(term, len(terms)) for term in found])
        counts.extend(found.values())
        sizes.append(len(found))
        lengths.append(found.total())
    numbers, counts, sizes, lengths = map(np.asarray, (numbers, counts, sizes, lengths))         # views: int32
    frequency = np.bincount(numbers, minlength=len(terms))
    order = np.argsort(numbers, kind="stable")       # by term, and documents in their order within one
    documents = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[order]
    idf = np.log(1 + (len(sizes) - frequency + 0.5) / (frequency + 0.5))
    penalty = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-9))
    weights = np.empty(len(order), dtype=np.float32)
    for first in range(0, len(order), 1 << 20):      # in parts, as the fp64 between would take five times the memory
        part = slice(first, first + (1 << 20))
        tf = counts[order[part]]
        weights[part] = idf[numbers[order[part]]] * tf / (tf + penalty[documents[part]])
    return Postings(np.array(list(ids)), terms, np.append(0, np.cumsum(frequency)), documents, weights)


def save_postings(postings, folder):
    """Writes all of an index except its ids."""
    for name in ("starts", "documents", "weights"):
        np.save(folder / f"search_{name}.npy", getattr(postings, name))
    (folder / "search_terms.txt").write_text("\n".join(postings.terms), encoding="utf-8")


def load_postings(folder, ids):
    """The `Postings` that `save_postings` wrote, memory-mapped."""
    terms = (folder / "search_terms.txt").read_text(encoding="utf-8").split("\n")
    arrays = [np.load(folder / f"search_{name}.npy", mmap_mode="r") for name in ("starts", "documents", "weights")]
    return Postings(ids, {term: number for number, term in enumerate(terms)}, *arrays)


def bm25_scores(postings, query):
    """The score of every document, [number of documents] fp32; 0 where no term of the query occurs."""
    scores = np.zeros(len(postings.ids), dtype=np.float32)
    for term in search_terms(query):
        if term in postings.terms:
            number = postings.terms[term]
            entries = slice(postings.starts[number], postings.starts[number + 1])
            scores[postings.documents[entries]] += postings.weights[entries]
    return scores


def candidates(scores, k):
    """The numbers of some documents, in order, among which are the best k: sorting those is enough."""
    size = len(scores) // (8 * k)
    if size < 64:
        hits = np.flatnonzero(scores)
        return hits if len(hits) <= k else hits[scores[hits] >= np.partition(scores[hits], -k)[-k]]
    highest = scores[:len(scores) // size * size].reshape(-1, size).max(1)
    floor = np.partition(highest, -k)[-k]            # so many blocks, and so at least k documents, reach it
    return np.flatnonzero(scores >= floor if floor > 0 else scores)


def bm25(postings, query, k=HITS):
    """The identifiers of the best k documents or fewer, best first; equal scores in document order."""
    scores = bm25_scores(postings, query)
    hits = candidates(scores, k)
    best = hits[np.argsort(-scores[hits], kind="stable")][:k]
    return tuple(postings.ids[best].tolist())


def product_document(product):
    """The text that is indexed for a product, as in the original's search_engine/convert_product_file_format.py.

    It is the title, the description, the first bullet point and the options, lower-cased.
    """
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product["options"].items())
    first_bullet = product["BulletPoints"][0] if product["BulletPoints"] else ""
    return " ".join([product["Title"], product["Description"], first_bullet, options]).lower()


# ---------------------------------------------------------------------------------------------------------------------
# Passages
# ---------------------------------------------------------------------------------------------------------------------

class Corpus(NamedTuple):
    """Passages and an index over them."""
    ids: list                            # identifiers
    passages: list                       # texts, of the form "Title"\nText
    postings: Postings                   # over the passages' numbers


def make_corpus(ids, passages):
    return Corpus(list(ids), list(passages), build_postings(range(len(passages)), passages))


@functools.lru_cache(maxsize=4)
def read_corpus(path):
    """The `Corpus` in a JSONL file of {"id", "contents"} per line, the format of Search-R1's corpora."""
    ids, passages = [], []
    for where, row in read_jsonl(path):
        if not isinstance(row.get("contents"), str):
            raise ValueError(f"{where}: there is no text as contents; a line is {{\"id\": .., \"contents\": ..}}.")
        ids.append(str(row.get("id", len(ids))))
        passages.append(row["contents"])
    if not passages:
        raise ValueError(f"{path} holds no passage; give a file with at least one.")
    return make_corpus(ids, passages)


def corpus_search(corpus, query, topk):
    """The topk best passages, best first: a retriever, once the corpus is bound."""
    return [corpus.passages[number] for number in bm25(corpus.postings, query, topk)]


# ---------------------------------------------------------------------------------------------------------------------
# Client and server
# ---------------------------------------------------------------------------------------------------------------------

def is_this_host(host):
    """Whether a server's name or address is this machine's own, which no proxy can reach for us."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def result_passages(reply):
    """The passages in the JSON text of a server's answer to one query. Raises ValueError if it has another form."""
    try:
        result = json.loads(reply)["result"]
        found = result[0] if result != [] else []
        if not isinstance(result, list) or not isinstance(found, list):
            raise TypeError("not lists")
        passages = [entry.get("document", entry)["contents"] for entry in found]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError('the answer is not of the form {"result": [[{"document": {"contents": ..}}]]} '
                         f"({type(error).__name__})") from error
    if not all(isinstance(passage, str) for passage in passages):
        raise ValueError("the answer has contents that are not text")
    return passages


def retry_after(headers):
    """Seconds that a server asks to wait (a number or a date), or None."""
    text = headers.get("Retry-After") or ""
    try:
        return float(text) if text.strip().isdecimal() else (
            email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):  # what parsedate_to_datetime raises where there is no date
        return None


class TimedReader(io.RawIOBase):
    """What a socket receives until a moment of time.monotonic(), however slowly it comes; then TimeoutError."""

    def __init__(self, raw, sock, deadline):
        self.raw, self.sock, self.deadline = raw, sock, deadline

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.sock.settimeout(left)
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


class TimedResponse(http.client.HTTPResponse):
    def __init__(self, sock, *args, deadline, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(TimedReader(self.fp.detach(), sock, deadline))


class TimedHandler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens http and https addresses; the answer, headers included, must be there by request.deadline."""

    def __init__(self):
        self.context = ssl.create_default_context()
        super().__init__(context=self.context)

    def connected(self, kind, deadline, *args, **kwargs):
        connection = kind(*args, **kwargs)
        connection.response_class = functools.partial(TimedResponse, deadline=deadline)
        return connection

    def http_open(self, request):
        return self.do_open(functools.partial(self.connected, http.client.HTTPConnection, request.deadline), request)

    def https_open(self, request):
        return self.do_open(functools.partial(self.connected, http.client.HTTPSConnection, request.deadline), request,
                            context=self.context)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the question, and the password, to a host that the user has not named."""

    def redirect_request(self, *args):
        return None                      # urllib then treats the status as an error


class Retriever:
    """Client of a server that answers POST /retrieve, ours or Search-R1's or SDAR's: (query, topk) -> passages.

    Search-R1's server reads a list under "queries", SDAR's a text under "query": the first that is understood is kept.
    url: maybe with user, password and query, which no message shows. timeout: seconds for a search, with its tries and
    pauses. tries: a refused connection, a time-out, and a status of 429 or from 500 are tried again, after `pause`
    seconds, twice as many, .. or as many as the server asks for. A proxy of the environment is used except for this
    machine; redirects are not followed.
    Raises ConnectionError if no try succeeds and ValueError for a refusal or an answer of another form.
    """

    def __init__(self, url, *, timeout=RETRIEVER_TIMEOUT, tries=RETRIEVER_TRIES, pause=RETRIEVER_PAUSE):
        parts = split_address(url)
        path = parts.path.rstrip("/").removesuffix("/retrieve") + "/retrieve"
        address = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=urllib.parse.quote(path, safe="/%"))
        self.url, self.shown = address.geturl(), without_secrets(address.geturl())
        self.headers = {"Content-Type": "application/json"}
        if parts.username is not None:
            secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            self.headers["Authorization"] = f"Basic {base64.b64encode(secret.encode()).decode()}"
        proxies = [urllib.request.ProxyHandler({})] if is_this_host(parts.hostname) else []
        self.opener = urllib.request.build_opener(TimedHandler, NoRedirect, *proxies)
        self.timeout, self.tries, self.pause = timeout, tries, pause
        self.key = None                  # of the query in a request, once one has worked

    def probe(self):
        """Searches once and forgets the answer, so that a server that is not there is noticed before it is needed.
        Raises ConnectionError and ValueError, with a sentence on what to do."""
        try:
            self("probe", 1)
        except (ConnectionError, ValueError) as error:
            raise type(error)(f"The retriever does not work ({error}): start it, or give another address.") from error

    def __call__(self, query, topk):
        deadline = time.monotonic() + self.timeout
        forms, refusals = {"queries": [query], "query": query}, []
        for key in [self.key] if self.key else forms:
            try:
                body = {key: forms[key], "topk": topk, "return_scores": True}
                passages = result_passages(self._post(json.dumps(body).encode(), deadline))
            except ValueError as error:
                refusals.append(error)
                continue
            self.key = key
            return passages
        raise ValueError(f"{self.shown}: {refusals[0]}")

    def _post(self, body, deadline):
        """The bytes of the answer to a request whose body is `body`."""
        number, left, reason = 0, deadline - time.monotonic(), "timed out"
        while number < self.tries and left > 0:
            number += 1
            limit = left if number == self.tries else left / 2       # a try that hangs leaves time for another
            try:
                return self._try(body, limit)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code < 500 and error.code != 429:
                    redirects = ", a redirect, which is not followed" if error.code < 400 else ""
                    raise ValueError(f"the request was refused with status {error.code}{redirects}") from error
                reason, pause = f"status {error.code}", retry_after(error.headers)
            except (OSError, http.client.HTTPException) as error:
                reason, pause = str(getattr(error, "reason", None) or error).strip(), None
            left = deadline - time.monotonic()
            if number < self.tries and left > 0:
                pause = self.pause * number if pause is None else max(pause, 0.0)
                time.sleep(min(pause, RETRY_AFTER_LIMIT, left / 2))
                left = deadline - time.monotonic()
        raise ConnectionError(f"{self.shown}: no answer in {number} tries, within {self.timeout:g} s; the last one "
                              f"ended with: {reason}")

    def _try(self, body, limit):
        request = urllib.request.Request(self.url, body, self.headers)
        request.deadline = time.monotonic() + limit
        with self.opener.open(request, timeout=limit) as reply:
            answer = reply.read(ANSWER_LIMIT + 1)
            if len(answer) > ANSWER_LIMIT:
                raise ValueError(f"the answer is longer than {ANSWER_LIMIT} bytes")
            if reply.length:             # bytes that were announced and did not come
                raise http.client.IncompleteRead(answer, reply.length)
        return answer


def split_address(url):
    """The parts of a retriever's address. Raises ValueError for any other text, shown if it can hold no secret."""
    shown = "" if re.search("[@?#]", url) else f", not {url!r}"
    refused = ValueError(f"The retriever's address must be like http://127.0.0.1:8000{shown}.")
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:          # a port that is not a number, or half of a pair of brackets
        raise refused from error
    # an @ behind the host means that the user's or the password's slash cuts the host off: write it as %2F
    if not valid or "@" in parts.path or parts.fragment or re.search(r"[\s\x00-\x1f\x7f\ud800-\udfff]", url):
        raise refused
    return parts


def retrieve(corpus, request, topk):
    """The server's answer to a request, both as JSON objects. Raises ValueError for a malformed request.

    request: {"queries": [texts]} or {"query": text}, maybe with "topk" and "return_scores". topk: where it gives none.
    Returns {"result": [passages per query]}, a passage being {"id", "contents"}, or with return_scores
    {"document": passage, "score": number}.
    """
    if not isinstance(request, dict) or ("queries" in request) == ("query" in request):
        raise ValueError('The request must be a JSON object with either "queries" (a list) or "query" (a text).')
    queries = request["queries"] if "queries" in request else [request["query"]]
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError('"queries" must be a list of texts, "query" a text.')
    topk = topk if request.get("topk") is None else request["topk"]
    if type(topk) is not int or topk < 1:
        raise ValueError('"topk" must be a whole number of at least 1, or null.')
    result = []
    for query in queries:
        scores = bm25_scores(corpus.postings, query)
        found = [({"id": corpus.ids[number], "contents": corpus.passages[number]}, float(scores[number]))
                 for number in bm25(corpus.postings, query, topk)]
        result.append([{"document": document, "score": score} if request.get("return_scores") else document
                       for document, score in found])
    return {"result": result}


class RetrieveHandler(http.server.BaseHTTPRequestHandler):
    """Answers POST /retrieve by `retrieve`, with the corpus and topk of its server."""
    timeout = 30                         # seconds for a client to send its request

    def do_POST(self):
        if self.path.rstrip("/") != "/retrieve":
            return self.answer(404, {"error": f"There is nothing at {self.path}; post to /retrieve."})
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > REQUEST_LIMIT:
            return self.answer(413, {"error": f"A request must give its length, at most {REQUEST_LIMIT} bytes."})
        try:
            request = json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError) as error:
            return self.answer(400, {"error": f"The request is not JSON: {error}."})
        try:
            self.answer(200, retrieve(self.server.corpus, request, self.server.topk))
        except ValueError as error:
            self.answer(400, {"error": str(error)})

    def do_GET(self):
        self.answer(405, {"error": 'Post {"queries": ["..."], "topk": 3} to /retrieve.'})

    def answer(self, status, body):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):        # a line per search of a training run would help nobody
        pass


class SearchServer(http.server.ThreadingHTTPServer):
    def __init__(self, corpus, host, port, topk):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.corpus, self.topk = corpus, topk
        super().__init__((host, port), RetrieveHandler)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}/retrieve"


def search_server(corpus, host="127.0.0.1", port=8000, topk=3):
    """An HTTP server, bound and not yet started, that answers POST /retrieve from `corpus`; port 0 takes a free one.

    topk: passages for a request that asks for no number. Raises ValueError for a topk below 1 and OSError or
    OverflowError for an address that cannot be bound.
    """
    if topk < 1:
        raise ValueError(f"topk must be at least 1, not {topk}")
    return SearchServer(corpus, host, port, topk)
