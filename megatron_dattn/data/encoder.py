"""From one row of a data set to one encoded sample: the part that Energon knows nothing of."""

from dataclasses import dataclass

import numpy as np

from megatron_dattn.data.conversation import Conversation
from megatron_dattn.data.images import ImagePreprocessor, read_image_file
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.template import ConversationTokenizer, TextRows


@dataclass(frozen=True)
class EncodedRow:
    """What becomes of a conversation: text rows, labels, and images as bytes."""

    input_ids: np.ndarray  # int64 [text rows]
    labels: np.ndarray  # int64 [text rows]
    image_offsets: tuple[int, ...]
    images: list[np.ndarray]  # uint8 [image_size, image_size, 3] each


@dataclass(frozen=True)
class RowEncoder:
    """Tokenises a conversation, reads its images, and holds both to the pack's budgets."""

    tokenizer: ConversationTokenizer
    preprocessor: ImagePreprocessor
    grid: tuple[int, int]
    """Patch rows and patch columns of one image."""
    visual_budget: int
    text_budget: int
    truncate: bool = False
    """Cut a conversation that is too long after an answer, instead of rejecting it."""

    def __call__(self, conversation: Conversation, image_root: str) -> EncodedRow:
        """Encode.

        Raises:
            SampleError: the sample cannot be used; its reason says why.
        """
        rows, image_paths = self.text_rows(conversation)
        images = [self.preprocessor.fit(read_image_file(image_root, p)) for p in image_paths]
        return EncodedRow(
            input_ids=np.array(rows.input_ids, dtype=np.int64),
            labels=np.array(rows.labels, dtype=np.int64),
            image_offsets=rows.image_offsets,
            images=images,
        )

    def text_rows(self, conversation: Conversation) -> tuple[TextRows, tuple[str, ...]]:
        """The text rows and the images that belong to them, within the budgets.

        Raises:
            SampleError: the conversation does not fit, or the template cannot express it.
        """
        while True:
            rows = self.tokenizer(conversation)
            excess = self._excess(rows)
            if excess is None:
                return rows, conversation.images
            if not self.truncate or len(conversation.turns) <= 2:
                raise excess
            conversation = conversation.without_last_exchange()

    def _excess(self, rows: TextRows) -> SampleError | None:
        num_text_rows = len(rows.input_ids)
        if num_text_rows > self.text_budget:
            return SampleError(
                Reason.TOO_MUCH_TEXT,
                f"{num_text_rows} text rows exceed data.text_budget {self.text_budget}",
            )
        num_images = len(rows.image_offsets)
        num_visual_rows = num_images * self.grid[0] * self.grid[1]
        if num_visual_rows > self.visual_budget:
            return SampleError(
                Reason.TOO_MANY_IMAGES,
                f"{num_images} images make {num_visual_rows} visual rows, more than "
                f"data.visual_budget {self.visual_budget}",
            )
        return None
