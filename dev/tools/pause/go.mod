module github.com/qlora-operator/qlora-operator/dev/tools/pause

go 1.26.0
