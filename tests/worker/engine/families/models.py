"""A tiny model of every family, with random weights and the family's own processor.

The weights are drawn wide: with the default initialisation a small random model repeats one token
whatever it is shown, and proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.worker.engine.families.checkpoints import (
    BOS,
    TEXT,
    chat_template,
    new_tokenizer,
    token_ids,
    write,
)
from visq.pixels import PixelBuffer
from visq.types import ImagePart, Message
from worker.engine.families.processors import load_processor

MROPE: Final = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def reference(
    folder: Path,
    messages: Sequence[Message],
    images: Sequence[PixelBuffer | NDArray[np.uint8]] = (),
    max_new_tokens: int = 24,
) -> list[int]:
    """The tokens that transformers' ``generate`` answers, greedily, without the end token.

    :param images: RGB, (height, width, 3), one for each image part.
    """
    model, processor = load(folder)
    conversation: list[dict[str, Any]] = []
    for message in messages:
        parts = [
            {"type": "image"}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": part.text}
            for part in message.parts()
        ]
        if not takes_images(folder):
            conversation.append(
                {"role": message.role, "content": "\n".join(part["text"] for part in parts)}
            )
        else:
            conversation.append({"role": message.role, "content": parts})
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": BOS not in text}
    if images:
        options["images"] = [
            Image.fromarray(image.array() if isinstance(image, PixelBuffer) else image)
            for image in images
        ]
    inputs = processor(text=[text], **options)
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    answer = [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]
    return answer[:-1] if answer[-1] == model.generation_config.eos_token_id else answer


_LOADED: dict[Path, tuple[Any, Any]] = {}


def load(folder: Path) -> tuple[Any, Any]:
    """The model at `folder` and its processor (of a text model: its tokenizer); loaded once."""
    if folder not in _LOADED:
        auto = AutoModelForImageTextToText if takes_images(folder) else AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        processor = load_processor if takes_images(folder) else AutoTokenizer.from_pretrained
        _LOADED[folder] = model, processor(folder)
    return _LOADED[folder]


def takes_images(folder: Path) -> bool:
    return (folder / "processor_config.json").exists()


def _text_model(kind: Any, config: Any, folder: Path, *, bos: str = "") -> Path:
    tokenizer = new_tokenizer(bos=bos or None)
    tokenizer.chat_template = chat_template("", bos=bos)
    return write(kind(config(**TEXT, **token_ids(tokenizer))), tokenizer, folder)


def _internvl(folder: Path) -> Path:
    """One to four tiles and a thumbnail; four tokens a tile."""
    tokenizer = new_tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    tokenizer.chat_template = chat_template("<IMG_CONTEXT>\n")
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            layer_scale_init_value=1.0,
        ),
        text_config=Qwen2Config(**TEXT, **token_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return write(
        InternVLForConditionalGeneration(config),
        tokenizer,
        folder,
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 32, "width": 32},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 4,
        },
        processor_class="InternVLProcessor",
        image_seq_length=4,
    )


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = new_tokenizer(
        "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
    )
    tokenizer.chat_template = chat_template("<|vision_start|><|image_pad|><|vision_end|>")
    return tokenizer


def _qwen_vl(
    kind: Any, config: Any, processor: str, vision: Mapping[str, Any], folder: Path
) -> Path:
    """Four to twenty tokens a picture."""
    tokenizer = _qwen_tokenizer()
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    text = {**TEXT, "head_dim": 16, "rope_parameters": MROPE, **token_ids(tokenizer)}
    model = kind(
        config(text_config=text, vision_config=dict(vision), tie_word_embeddings=False, **ids)
    )
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 4 * 16 * 16, "longest_edge": 20 * 16 * 16},
        "patch_size": 8,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    return write(model, tokenizer, folder, image_processor, processor_class=processor)


VISION_TOWER: Final = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def _llava_tokenizer(bos: str | None = BOS) -> PreTrainedTokenizerFast:
    tokenizer = new_tokenizer("<image>", "<video>", bos=bos)
    tokenizer.chat_template = chat_template("<image>\n")
    return tokenizer


def _llava(folder: Path) -> Path:
    """Four tokens a picture."""
    tokenizer = _llava_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION_TOWER),
        text_config=LlamaConfig(**TEXT, **token_ids(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    return write(
        LlavaForConditionalGeneration(config),
        tokenizer,
        folder,
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
        },
        processor_class="LlavaProcessor",
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next(folder: Path) -> Path:
    """Ten to twenty-eight tokens a picture."""
    tokenizer = _llava_tokenizer()
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION_TOWER),
        text_config=LlamaConfig(**TEXT, **token_ids(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=4,
    )
    return write(
        LlavaNextForConditionalGeneration(config),
        tokenizer,
        folder,
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
            "image_grid_pinpoints": pinpoints,
        },
        processor_class="LlavaNextProcessor",
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_onevision(folder: Path) -> Path:
    """Large pictures are interpolated down (``anyres_max_2``)."""
    tokenizer = _llava_tokenizer(bos=None)
    pinpoints = [[32, 32], [32, 64], [64, 32], [64, 64], [64, 96], [96, 64]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION_TOWER, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, **token_ids(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
    )
    return write(
        LlavaOnevisionForConditionalGeneration(config),
        tokenizer,
        folder,
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 32, "width": 32},
            "image_grid_pinpoints": pinpoints,
        },
        processor_class="LlavaOnevisionProcessor",
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )


def _idefics(kind: Any, config: Any, image_processor: str, folder: Path) -> Path:
    """Up to four tiles and the whole picture; four tokens a tile, with tokens between them.

    SmolVLM has the processor of Idefics3, too: its own makes the same of pictures, but wants a
    package for the timestamps of videos.
    """
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = new_tokenizer(
        "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *rows, bos=BOS
    )
    tokenizer.chat_template = chat_template("<image>")
    model = kind(
        config(
            vision_config={**VISION_TOWER, "patch_size": 8},
            text_config=LlamaConfig(**TEXT, **token_ids(tokenizer)),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return write(
        model,
        tokenizer,
        folder,
        {
            "image_processor_type": image_processor,
            "size": {"longest_edge": 64},
            "max_image_size": {"longest_edge": 32},
        },
        processor_class="Idefics3Processor",
        image_seq_len=4,
    )


QWEN2_VISION: Final = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 8,
}
QWEN2_5_VISION: Final = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "window_size": 32,
    "fullatt_block_indexes": [2],
}
QWEN3_VISION: Final = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 8,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}

FAMILIES: Final[dict[str, Callable[[Path], Path]]] = {
    "internvl": _internvl,
    "qwen2_vl": partial(
        _qwen_vl, Qwen2VLForConditionalGeneration, Qwen2VLConfig, "Qwen2VLProcessor", QWEN2_VISION
    ),
    "qwen2_5_vl": partial(
        _qwen_vl,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        "Qwen2_5_VLProcessor",
        QWEN2_5_VISION,
    ),
    "qwen3_vl": partial(
        _qwen_vl, Qwen3VLForConditionalGeneration, Qwen3VLConfig, "Qwen3VLProcessor", QWEN3_VISION
    ),
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "idefics3": partial(
        _idefics, Idefics3ForConditionalGeneration, Idefics3Config, "Idefics3ImageProcessor"
    ),
    "smolvlm": partial(
        _idefics, SmolVLMForConditionalGeneration, SmolVLMConfig, "SmolVLMImageProcessor"
    ),
    "mistral": partial(
        _text_model, MistralForCausalLM, partial(MistralConfig, sliding_window=None)
    ),
    "llama": partial(_text_model, LlamaForCausalLM, LlamaConfig, bos=BOS),
    "qwen2": partial(_text_model, Qwen2ForCausalLM, Qwen2Config),
    "qwen3": partial(_text_model, Qwen3ForCausalLM, partial(Qwen3Config, head_dim=16)),
}
"""By name: writes a tiny checkpoint to a folder, and returns the folder."""
