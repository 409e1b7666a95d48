// Names the ops' namespace, torch.ops.<namespace>: each library has its own, as they may differ.

namespace specextend::emulation {
extern const char library_namespace[];
const char library_namespace[] = SPECEXTEND_EMULATION_NAMESPACE;
}  // namespace specextend::emulation
