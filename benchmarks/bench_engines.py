"""What LlamaIndex's engines make of a prompt, and how much of the documents in it is restored.

    python benchmarks/bench_engines.py [--quick] [--json]

It prints the table of docs/llamaindex.md (SmolLM2-135M; `--quick`: every sixth row).
One row for each way to ask: a query engine, a chat engine, a postprocessor or a retriever. The
share is that of the documents' tokens in all prompts of the row, found by looking for every
stretch of `MIN_CHARS` characters of any document, so that cut and rewritten documents count too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from common import ROOT, Target, arguments, at_least, finish, machine, quiet_transformers
from llama_index.core import (
    PromptTemplate,
    Settings,
    StorageContext,
    SummaryIndex,
    VectorStoreIndex,
)
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.base_selector import BaseSelector, SelectorResult, SingleSelection
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.indices.query.query_transform import (
    HyDEQueryTransform,
    StepDecomposeQueryTransform,
)
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import (
    HierarchicalNodeParser,
    SentenceSplitter,
    SentenceWindowNodeParser,
    get_leaf_nodes,
)
from llama_index.core.postprocessor import (
    LLMRerank,
    LongContextReorder,
    MetadataReplacementPostProcessor,
    PrevNextNodePostprocessor,
    SentenceEmbeddingOptimizer,
    SimilarityPostprocessor,
)
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import (
    CitationQueryEngine,
    MultiStepQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.retrievers import (
    AutoMergingRetriever,
    QueryFusionRetriever,
    RecursiveRetriever,
)
from llama_index.core.schema import (
    Document,
    IndexNode,
    MetadataMode,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.core.tools import QueryEngineTool, ToolMetadata

from hcache_rag import StateStore
from hcache_rag.answering import Answering
from hcache_rag.bundled import default_model_path
from hcache_rag.llama_index import HCacheLLM, HCacheRetriever, default_embedding
from hcache_rag.llama_index.text import llm_texts
from hcache_rag.models import load_model

MIN_CHARS = 24
QUESTION = "Which planet is the hottest?"
NEXT = "And which one is the coldest?"


# --- what is restored -----------------------------------------------------------------------------


@dataclass
class Record:
    """What prompts held, in tokens.

    Args:
        documents: of documents.
        restored: of these, restored.
        prompts: how many there were.
    """

    texts: Sequence[str] = ()
    documents: int = 0
    restored: int = 0
    prompts: int = 0
    log: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def share(self) -> float | None:
        """Of the documents' tokens, what was restored; None where no prompt held a document."""
        return self.restored / self.documents if self.documents else None


@contextmanager
def recording() -> Iterator[Record]:
    """Everything that engines read inside the block."""
    record, run = Record(), Answering._answer

    def recorded(self: Answering, composition: Any, request: Any) -> Any:
        answer = run(self, composition, request)
        tokens = [str(self.tokenizer.decode([t])) for t in composition.token_ids.tolist()]
        record.log.append(("".join(tokens), (tokens, composition.restored_positions)))
        return answer

    Answering._answer = recorded  # type: ignore[method-assign]
    try:
        yield record
    finally:
        Answering._answer = run  # type: ignore[method-assign]


def count(record: Record, texts: Sequence[str]) -> Record:
    """Fill a record in, given the documents that its prompts may hold."""
    stretches = {t[i : i + MIN_CHARS] for t in texts for i in range(len(t) - MIN_CHARS + 1)}
    for prompt, (tokens, restored) in record.log:
        inside = np.zeros(len(prompt) + 1, dtype=bool)
        for at in range(len(prompt) - MIN_CHARS + 1):
            if prompt[at : at + MIN_CHARS] in stretches:
                inside[at : at + MIN_CHARS] = True
        begins = np.cumsum([0, *map(len, tokens)])[:-1]
        is_document = inside[begins]
        is_restored = np.zeros(len(tokens), dtype=bool)
        is_restored[restored] = True
        record.documents += int(is_document.sum())
        record.restored += int((is_document & is_restored).sum())
        record.prompts += 1
    return record


# --- ways to ask ----------------------------------------------------------------------------------


@dataclass
class World:
    """What every row finds: an LLM with a store, documents, and an embedding."""

    llm: HCacheLLM
    documents: list[Document]
    embed_model: BaseEmbedding
    top_k: int = 4

    def nodes(self) -> list[TextNode]:
        """One for each document."""
        return [TextNode(text=d.text, id_=d.id_, metadata=d.metadata) for d in self.documents]

    def index(self, nodes: Sequence[Any]) -> VectorStoreIndex:
        """An index, its nodes read once."""
        self.llm.engine.precompute(llm_texts(nodes))
        return VectorStoreIndex(nodes, embed_model=self.embed_model)

    def retriever(self, top_k: int | None = None, nodes: Sequence[Any] | None = None) -> Any:
        """The usual one."""
        index = self.index(self.nodes() if nodes is None else nodes)
        inner = index.as_retriever(similarity_top_k=top_k or self.top_k)
        return HCacheRetriever.wrap(inner, self.llm)

    def narrow(self, mode: str, share: float) -> Any:
        """A synthesizer into whose prompts fits a share of the retrieved documents."""
        tokens = sum(len(self.llm.tokenize(d.text)) for d in self.documents[: self.top_k])
        helper = PromptHelper(
            self.llm.metadata.context_window,
            num_output=16,
            chunk_size_limit=int(share * tokens),
            tokenizer=self.llm.tokenize,
        )
        return get_response_synthesizer(
            llm=self.llm, response_mode=ResponseMode(mode), prompt_helper=helper
        )


class FixedQuestions(BaseQuestionGenerator):
    """The questions that a larger model would ask."""

    def generate(self, tools: Sequence[ToolMetadata], query: QueryBundle) -> list[SubQuestion]:
        return [SubQuestion(sub_question=q, tool_name="planets") for q in (QUESTION, NEXT)]

    async def agenerate(
        self, tools: Sequence[ToolMetadata], query: QueryBundle
    ) -> list[SubQuestion]:
        return self.generate(tools, query)

    def _get_prompts(self) -> Any:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        pass


class FirstChoice(BaseSelector):
    """Chooses what a larger model would choose."""

    def _select(self, choices: Any, query: QueryBundle) -> SelectorResult:
        return SelectorResult(selections=[SingleSelection(index=0, reason="the first")])

    async def _aselect(self, choices: Any, query: QueryBundle) -> SelectorResult:
        return self._select(choices, query)

    def _get_prompts(self) -> Any:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        pass


def first_two(answer: str, num_choices: int, **_: Any) -> tuple[list[int], list[float]]:
    """How a rerank's answer is read: a small model names no numbers."""
    return [2, 1], [9.0, 8.0]


class OnlyWith(BaseNodePostprocessor):
    """Keeps nodes with a word, as KeywordNodePostprocessor, which needs spaCy, does."""

    word: str

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        return [scored for scored in nodes if self.word in scored.node.get_content()]


def sentences(text: str) -> list[str]:
    """Without NLTK's data."""
    return [f"{part.rstrip('.')}." for part in text.split(". ")]


def tool(world: World, engine: Any) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(engine, name="planets", description="All about planets")


def engine(world: World, retriever: BaseRetriever | None = None, **options: Any) -> Any:
    """The usual query engine."""
    return RetrieverQueryEngine.from_args(retriever or world.retriever(), llm=world.llm, **options)


Ask = Callable[[World], Any]
"""Makes an engine: something with `query`, or with `chat`."""


def of_mode(mode: str) -> Ask:
    return lambda world: engine(world, response_mode=mode)


def narrow(mode: str, share: float) -> Ask:
    return lambda world: RetrieverQueryEngine(
        world.retriever(), response_synthesizer=world.narrow(mode, share)
    )


def with_template(template: str) -> Ask:
    return lambda world: engine(world, text_qa_template=PromptTemplate(template))


def with_postprocessors(*make: Callable[[World], Any], top_k: int = 4) -> Ask:
    def ask(world: World) -> Any:
        retriever = world.retriever(top_k)
        return engine(world, retriever, node_postprocessors=[one(world) for one in make])

    return ask


def with_metadata(world: World) -> list[TextNode]:
    """Nodes as `SimpleDirectoryReader` makes them: the model is shown where they are from."""
    nodes = world.nodes()
    for node in nodes:
        node.metadata = {"file_path": f"/data/planets/{node.node_id}.md"}
    return nodes


def citing(metadata: bool, mode: MetadataMode = MetadataMode.NONE) -> Ask:
    def ask(world: World) -> Any:
        nodes = with_metadata(world) if metadata else world.nodes()
        return CitationQueryEngine(world.retriever(nodes=nodes), llm=world.llm, metadata_mode=mode)

    return ask


def sub_questions(world: World) -> Any:
    return SubQuestionQueryEngine.from_defaults(
        [tool(world, engine(world))],
        question_gen=FixedQuestions(),
        response_synthesizer=get_response_synthesizer(llm=world.llm),
        use_async=False,
        verbose=False,
    )


def routed(world: World) -> Any:
    tools = [tool(world, engine(world)), tool(world, SummaryIndex([]).as_query_engine(world.llm))]
    return RouterQueryEngine(FirstChoice(), tools, llm=world.llm)


def in_steps(world: World) -> Any:
    return MultiStepQueryEngine(
        engine(world),
        StepDecomposeQueryTransform(llm=world.llm),
        response_synthesizer=get_response_synthesizer(llm=world.llm),
        index_summary="All about planets",
        num_steps=2,
    )


def hypothetical(world: World) -> Any:
    return TransformQueryEngine(engine(world), HyDEQueryTransform(llm=world.llm))


def summary(world: World) -> Any:
    nodes = world.nodes()[: world.top_k]
    world.llm.engine.precompute(llm_texts(nodes))
    return SummaryIndex(nodes).as_query_engine(world.llm, response_mode="tree_summarize")


def windows(is_known: bool) -> Ask:
    """Sentences are found, and replaced by what stands around them."""

    def ask(world: World) -> Any:
        nodes = SentenceWindowNodeParser(window_size=1).get_nodes_from_documents(world.documents)
        for node in nodes:
            node.excluded_llm_metadata_keys = ["window", "original_text"]
        retriever = world.retriever(nodes=nodes)
        if is_known:
            world.llm.engine.precompute(node.metadata["window"] for node in nodes)
        replace = MetadataReplacementPostProcessor(target_metadata_key="window")
        return engine(world, retriever, node_postprocessors=[replace])

    return ask


def merging(world: World) -> Any:
    """Leaves are found, and replaced by their parents where most of them are."""
    longest = max(len(world.llm.tokenize(d.text)) for d in world.documents)
    parser = HierarchicalNodeParser.from_defaults(
        node_parser_ids=["large", "small"],
        node_parser_map={
            name: SentenceSplitter(chunk_size=size, chunk_overlap=0, tokenizer=world.llm.tokenize)
            for name, size in (("large", longest + 8), ("small", longest // 3))
        },
    )
    nodes = parser.get_nodes_from_documents(world.documents)
    storage = StorageContext.from_defaults()
    storage.docstore.add_documents(nodes)
    world.llm.engine.precompute(llm_texts(nodes))
    leaves = get_leaf_nodes(nodes)
    index = VectorStoreIndex(leaves, storage_context=storage, embed_model=world.embed_model)
    found: Any = index.as_retriever(similarity_top_k=3 * world.top_k)
    retriever = AutoMergingRetriever(found, storage, simple_ratio_thresh=0.3)
    return engine(world, HCacheRetriever.wrap(retriever, world.llm))


def fused(world: World) -> Any:
    inner = [world.index(world.nodes()).as_retriever(similarity_top_k=k) for k in (3, 5)]
    retriever = QueryFusionRetriever(
        inner, llm=world.llm, similarity_top_k=world.top_k, num_queries=2, use_async=True
    )
    return engine(world, HCacheRetriever.wrap(retriever, world.llm))


def recursive(world: World) -> Any:
    """Short descriptions are found, and lead to the documents."""
    nodes = world.nodes()
    links = [IndexNode(text=n.text[:40], index_id=n.node_id, id_=f"to-{n.node_id}") for n in nodes]
    index = VectorStoreIndex(links, embed_model=world.embed_model)
    world.llm.engine.precompute(llm_texts(nodes))
    retriever = RecursiveRetriever(
        "root",
        {"root": index.as_retriever(similarity_top_k=world.top_k)},
        node_dict={node.node_id: node for node in nodes},
    )
    return engine(world, HCacheRetriever.wrap(retriever, world.llm))


def neighbours(world: World) -> Any:
    nodes = SentenceSplitter(
        chunk_size=max(len(world.llm.tokenize(d.text)) for d in world.documents) // 2,
        chunk_overlap=0,
        tokenizer=world.llm.tokenize,
    ).get_nodes_from_documents(world.documents)
    storage = StorageContext.from_defaults()
    storage.docstore.add_documents(nodes)
    add = PrevNextNodePostprocessor(docstore=storage.docstore, num_nodes=1, mode="both")
    return engine(world, world.retriever(2, nodes), node_postprocessors=[add])


def memory(world: World) -> ChatMemoryBuffer:
    window = world.llm.metadata.context_window
    return ChatMemoryBuffer.from_defaults(token_limit=window - 64, tokenizer_fn=world.llm.tokenize)


def simple_chat(world: World) -> Any:
    return SimpleChatEngine.from_defaults(llm=world.llm, memory=memory(world))


def context_chat(world: World) -> Any:
    return ContextChatEngine.from_defaults(world.retriever(2), llm=world.llm, memory=memory(world))


def condense_plus_context(world: World) -> Any:
    return CondensePlusContextChatEngine.from_defaults(
        world.retriever(2), llm=world.llm, memory=memory(world)
    )


def condense_question(world: World) -> Any:
    return CondenseQuestionChatEngine.from_defaults(
        engine(world, world.retriever(2)), llm=world.llm, memory=memory(world)
    )


@dataclass(frozen=True)
class Row:
    """One way to ask.

    Args:
        label: what it is.
        ask: makes the engine.
        floor: the least share; None where prompts hold no documents.
        note: why it is less than all.
    """

    label: str
    ask: Ask
    floor: float | None
    note: str = ""

    @property
    def is_chat(self) -> bool:
        """Whether it is asked twice, in a conversation."""
        return "chat engine" in self.label


QUESTION_FIRST = "Question: {query_str}\nRead this:\n{context_str}\nNow answer:"
CUT = "the end of a document that was cut in two is read"
SENTENCES = "sentences are left out: what stands behind the first gap is read"
ESCAPED = "line breaks become `\\n`: restored up to the first one, from 128 characters on"

ROWS = [
    Row("compact (default)", of_mode("compact"), 1.0),
    Row("compact, more documents than fit", narrow("compact", 0.6), 0.6, CUT),
    Row("refine", of_mode("refine"), 1.0),
    Row("refine, documents that do not fit", narrow("refine", 0.17), 0.5, CUT),
    Row("tree_summarize", of_mode("tree_summarize"), 1.0),
    Row("tree_summarize, more documents than fit", narrow("tree_summarize", 0.6), 0.6, CUT),
    Row("accumulate", of_mode("accumulate"), 1.0),
    Row("compact_accumulate", of_mode("compact_accumulate"), 1.0),
    Row("simple_summarize", of_mode("simple_summarize"), 0.0, ESCAPED),
    Row("generation", of_mode("generation"), None, "no documents in the prompt"),
    Row("no_text, context_only", of_mode("no_text"), None, "no prompt"),
    Row("a template with the question in front", with_template(QUESTION_FIRST), 1.0),
    Row("a template with nothing in front", with_template("{context_str}\n{query_str}"), 1.0),
    Row("nodes with metadata", lambda w: engine(w, w.retriever(nodes=with_metadata(w))), 1.0),
    Row("citation", citing(metadata=False), 1.0),
    Row(
        "citation, nodes with metadata",
        citing(metadata=True),
        0.0,
        "it drops the metadata, and the state is that of both; see `metadata_mode` below",
    ),
    Row("citation, `metadata_mode=MetadataMode.LLM`", citing(True, MetadataMode.LLM), 1.0),
    Row("sub-question", sub_questions, 1.0),
    Row("router", routed, 1.0),
    Row("multi-step", in_steps, 1.0),
    Row("HyDE", hypothetical, 1.0),
    Row("summary index", summary, 1.0),
    Row(
        "similarity cut-off, keywords",
        with_postprocessors(
            lambda _: SimilarityPostprocessor(similarity_cutoff=-1.0),
            lambda _: OnlyWith(word="the"),
        ),
        1.0,
    ),
    Row(
        "LLM rerank",
        with_postprocessors(
            lambda w: LLMRerank(
                llm=w.llm, top_n=2, choice_batch_size=4, parse_choice_select_answer_fn=first_two
            )
        ),
        1.0,
    ),
    Row("long-context reorder", with_postprocessors(lambda _: LongContextReorder()), 1.0),
    Row(
        "sentence optimizer",
        with_postprocessors(
            lambda w: SentenceEmbeddingOptimizer(
                embed_model=w.embed_model, percentile_cutoff=0.5, tokenizer_fn=sentences
            )
        ),
        0.0,
        SENTENCES,
    ),
    Row("previous and next nodes", neighbours, 0.99),
    Row(
        "sentence windows",
        windows(is_known=False),
        0.9,
        "the sentences of a window are states, the blanks between them are read",
    ),
    Row("sentence windows that were read", windows(is_known=True), 0.99),
    Row("auto-merging", merging, 0.99),
    Row("fusion", fused, 1.0),
    Row("recursive", recursive, 1.0),
    Row("simple chat engine", simple_chat, None, "no documents; see below for what was said"),
    Row("context chat engine", context_chat, 1.0),
    Row("condense-plus-context chat engine", condense_plus_context, 1.0),
    Row("condense-question chat engine", condense_question, 1.0),
]


def drained(response: Any) -> str:
    """A response's text, read to its end."""
    if isinstance(response, StreamingResponse):
        return "".join(response.response_gen or ())
    return str(response)


def asked(row: Row, world: World) -> tuple[list[str], Record]:
    """What a row answers, and what was restored for it."""
    Settings.llm, Settings.embed_model = world.llm, world.embed_model
    its = row.ask(world)
    with recording() as record:
        if row.is_chat:
            answers = [str(its.chat(text)) for text in (QUESTION, NEXT)]
        else:
            answers = [drained(its.query(QUESTION))]
    return answers, count(record, [document.text for document in world.documents])


def main() -> None:
    """Print the table for the bundled model, each row over a store of its own."""
    options = arguments(__doc__.splitlines()[0] if __doc__ else None).parse_args()
    quiet_transformers()
    model, tokenizer = load_model(str(default_model_path()))
    paths = sorted((ROOT / "examples" / "solar_system").glob("*.md"))[:8]
    documents = [Document(text=path.read_text(), id_=path.stem) for path in paths]
    embed_model = default_embedding()
    rows, targets = list[dict[str, Any]](), list[Target]()
    print("| | prompts | documents restored | |\n|---|---|---|---|")
    for row in ROWS[:: 6 if options.quick else 1]:
        store = StateStore.in_memory()
        with HCacheLLM(
            model=model, tokenizer=tokenizer, store=store, fidelity="none", max_new_tokens=8
        ) as llm:
            _, record = asked(row, World(llm, documents, embed_model))
        share = "" if record.share is None else f"{100 * record.share:.0f} %"
        print(f"| {row.label} | {record.prompts} | {share} | {row.note} |", flush=True)
        rows.append({"what": row.label, "prompts": record.prompts, "restored": record.share})
        if record.share is not None and row.floor is not None:
            targets.append(at_least(row.label, record.share, row.floor))
    finish(rows, targets, machine(), options.json)


if __name__ == "__main__":
    main()
