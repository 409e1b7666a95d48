// The namespace of the ops, torch.ops.<namespace>: one per library, as libraries may differ.

namespace specextend::emulation {
extern const char library_namespace[];
const char library_namespace[] = SPECEXTEND_EMULATION_NAMESPACE;
}  // namespace specextend::emulation
