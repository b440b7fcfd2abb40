//! Layers to blobs and one EROFS of metadata, plus the image's run settings.
