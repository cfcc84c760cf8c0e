"""From one record of a data set to one encoded sample: the part that Energon knows nothing of."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_dattn.data.config import DataConfig
from megatron_dattn.data.conversation import IMAGE_TOKEN, Conversation
from megatron_dattn.data.image_files import ImageRoot
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.policies import Fixes, Policies
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.squares import count_squares, may_be_several, read_squares
from megatron_dattn.data.template import ConversationTokenizer, TextTokens
from megatron_dattn.data.tokenizer import load_tokenizer, padding_id
from megatron_dattn.data.videos import Video
from megatron_dattn.errors import ConfigError


@dataclass(frozen=True)
class ModelSizes:
    """What of the model its data must fit."""

    image_size: int
    """Side of the encoder's square input in pixels."""
    image_grid: tuple[int, int]
    """Rows and columns of the visual tokens that the decoder gets of an image."""
    vocab_size: int

    @property
    def tokens_per_image(self) -> int:
        rows, columns = self.image_grid
        return rows * columns


@dataclass(frozen=True)
class EncodedConversation:
    """What becomes of a conversation: text tokens, labels, and the squares of its images."""

    input_ids: np.ndarray  # int64 [text tokens]
    labels: np.ndarray  # int64 [text tokens]
    image_offsets: tuple[int, ...]  # per square: text tokens before it
    images: list[np.ndarray]  # uint8 [image_size, image_size, 3] each
    fixed: frozenset[Reason] = frozenset()
    """Problems of the record that were fixed."""


@dataclass(frozen=True)
class SampleEncoder:
    """Tokenises a conversation, reads its images, and holds both to the pack's budgets."""

    tokenizer: ConversationTokenizer
    preprocessor: ImagePreprocessor
    grid: tuple[int, int]
    """Patch rows and patch columns of one square."""
    visual_budget: int
    text_budget: int
    truncate: bool = False
    """Cut a conversation that is too long after an answer, instead of rejecting it."""
    max_images: int | None = None
    """Of one sample, a video's frames among them and no tiles."""
    policies: Policies = field(default_factory=Policies)

    def __call__(self, conversation: Conversation, image_root: ImageRoot) -> EncodedConversation:
        """Encode.

        Raises:
            SampleError: the sample cannot be used; its reason says why.
        """
        tokens, conversation = self.text_tokens(conversation, image_root)
        fixes = Fixes(self.policies.fixing, set(conversation.fixed))
        squares = [
            square
            for image in conversation.images
            for square in read_squares(image, image_root, self.preprocessor, fixes)
        ]
        if len(squares) != len(tokens.image_offsets):
            raise SampleError(Reason.BROKEN_IMAGE, "an image changed while it was read")
        return EncodedConversation(
            input_ids=np.array(tokens.input_ids, dtype=np.int64),
            labels=np.array(tokens.labels, dtype=np.int64),
            image_offsets=tokens.image_offsets,
            images=squares,
            fixed=frozenset(fixes.made),
        )

    def text_tokens(
        self, conversation: Conversation, image_root: ImageRoot | None = None
    ) -> tuple[TextTokens, Conversation]:
        """The text tokens and what they are of: as much of a conversation as the budgets allow.

        Args:
            image_root: where the images are, whose headers say how many squares they become, and
                so how often a place of `image_offsets` stands there; once each where None.

        Raises:
            SampleError: the conversation does not fit, the template cannot express it, or the
                header of an image cannot be read.
        """
        conversation = self._bounded(conversation)
        tokens = self.tokenizer(conversation)
        if (error := self._excess(tokens)) is not None:
            conversation = self._beginning(conversation, error, self._measured_excess)
            tokens = self.tokenizer(conversation)
        images = conversation.images
        if image_root is None or not any(may_be_several(i, self.preprocessor) for i in images):
            return tokens, conversation
        fixes = Fixes(self.policies.fixing)  # noted when they are read for their pixels
        numbers = [count_squares(image, image_root, self.preprocessor, fixes) for image in images]

        def too_many(part: Conversation) -> SampleError | None:
            kept = numbers[: len(part.images)]
            pictures = sum(
                number if isinstance(image, Video) else 1
                for image, number in zip(part.images, kept, strict=True)
            )
            return self._too_many(pictures, sum(kept))

        if (error := too_many(conversation)) is not None:
            conversation = self._beginning(conversation, error, too_many)
            tokens = self.tokenizer(conversation)
        return tokens.repeated(numbers), conversation

    def _bounded(self, conversation: Conversation) -> Conversation:
        """As much of a conversation as may fit, judged by its length alone.

        Tokenising costs about a second and 0.3 GB per million characters: what cannot fit is not
        tokenised. Neither is it searched for control tokens then.

        Raises:
            SampleError: even its beginning cannot fit, or it may not be cut.
        """
        self.tokenizer.require_turns(conversation)
        if conversation.num_exchanges > self.text_budget:  # each has the token that ends it
            if not self.truncate:
                raise self._too_much(f"{conversation.num_exchanges} exchanges")
            conversation = _cut(conversation, self.text_budget, Reason.TOO_MUCH_TEXT)
        if (error := self._certain_excess(conversation)) is not None:
            conversation = self._beginning(conversation, error, self._certain_excess)
        return conversation

    def _beginning(
        self,
        conversation: Conversation,
        error: SampleError,
        excess: Callable[[Conversation], SampleError | None],
    ) -> Conversation:
        """The most exchanges of a conversation, not all of them, that do not exceed a limit.

        Args:
            error: by which the whole conversation exceeds it.
            excess: judges a beginning of it.

        Raises:
            SampleError: it may not be cut, or its first exchange is too much.
        """
        if not self.truncate or conversation.num_exchanges == 1:
            raise error
        first = conversation.first_exchanges
        numbers = range(1, conversation.num_exchanges)
        # More exchanges make more tokens, so halving finds the border.
        kept = bisect_left(numbers, True, key=lambda number: excess(first(number)) is not None)
        if kept == 0:
            raise excess(first(1)) or error
        return _cut(conversation, kept, error.reason)

    def _certain_excess(self, conversation: Conversation) -> SampleError | None:
        """Whether a conversation exceeds a budget however its text is tokenised."""
        most_images = self._most_squares
        most = self.text_budget * self.tokenizer.longest_token + most_images * len(IMAGE_TOKEN)
        texts = [turn.text for turn in conversation.turns]
        if sum(map(len, texts)) + len(conversation.system or "") <= most:
            return None  # within what the template adds, which is little
        length = len(self.tokenizer.render(conversation)[0])
        if length <= most:  # it does not write all of the text
            return None
        if len(conversation.images) > most_images:
            return self._too_many_squares(len(conversation.images))
        return self._too_much(f"{length} characters of text")

    def _measured_excess(self, conversation: Conversation) -> SampleError | None:
        return self._excess(self.tokenizer(conversation))

    def _excess(self, tokens: TextTokens) -> SampleError | None:
        if len(tokens.input_ids) > self.text_budget:
            return self._too_much(f"{len(tokens.input_ids)} text tokens")
        return self._too_many(len(tokens.image_offsets), len(tokens.image_offsets))

    def _too_many(self, images: int, squares: int) -> SampleError | None:
        """Whether so many images, of so many squares, exceed a limit."""
        if self.max_images is not None and images > self.max_images:
            return SampleError(
                Reason.TOO_MANY_IMAGES,
                f"{images} images, more than data.max_images_per_sample {self.max_images}",
            )
        return self._too_many_squares(squares) if squares > self._most_squares else None

    @property
    def _most_squares(self) -> int:
        return self.visual_budget // (self.grid[0] * self.grid[1])

    def _too_much(self, what: str) -> SampleError:
        return SampleError(
            Reason.TOO_MUCH_TEXT, f"{what} exceed data.text_budget {self.text_budget}"
        )

    def _too_many_squares(self, number: int) -> SampleError:
        what = "images" if self.preprocessor.resolutions is None else "images and tiles"
        return SampleError(
            Reason.TOO_MANY_IMAGES,
            f"{number} {what} make {number * self.grid[0] * self.grid[1]} visual tokens, more than "
            f"data.visual_budget {self.visual_budget}",
        )


def _cut(conversation: Conversation, kept: int, reason: Reason) -> Conversation:
    """The first exchanges, and why no more of them."""
    fixed = conversation.fixed | {reason}
    return replace(conversation.first_exchanges(kept), fixed=fixed)


def sample_encoder(config: DataConfig, sizes: ModelSizes) -> tuple[SampleEncoder, int]:
    """The encoder that a run's settings ask for, and the id that fills its text.

    Raises:
        ConfigError: tokenizer, template, image processor, budgets and model do not fit each other.
    """
    tokenizer = load_tokenizer(
        config.tokenizer, template=config.template, vocab_size=sizes.vocab_size
    )
    preprocessor = ImagePreprocessor.from_folder(
        config.image_processor or config.tokenizer or "",
        image_size=sizes.image_size,
        image_fit=config.image_fit,
        max_pixels=config.max_image_pixels,
        image_grid_pinpoints=config.image_grid_pinpoints,
        video_frames=config.video_frames,
    )
    tokens = preprocessor.max_squares * sizes.tokens_per_image
    if tokens > config.visual_budget:
        of_tiles = "" if preprocessor.max_squares == 1 else " with the most tiles"
        raise ConfigError(
            f"data.visual_budget {config.visual_budget} is smaller than one image{of_tiles}, which "
            f"has {tokens} visual tokens"
        )
    encoder = SampleEncoder(
        tokenizer=ConversationTokenizer(tokenizer, config.template),
        preprocessor=preprocessor,
        grid=sizes.image_grid,
        visual_budget=config.visual_budget,
        text_budget=config.text_budget,
        truncate=config.long_samples == "truncate",
        max_images=config.max_images_per_sample,
        policies=config.resolved_policies,
    )
    return encoder, padding_id(tokenizer)
